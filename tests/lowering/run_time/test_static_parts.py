"""Compiled programs neither compute constant tables nor make XLA fold them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering.run_time import plans
from pallas_kernels import block_mask
from sadsl.run.plans import plan_for
from tests import constants, content_cases

SEGMENTS = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), np.int32)


def program(spec, shape, operands, **options):
    """The jaxpr of a call and its gradient."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(q, k, v, operands):
        call = partial(sa.attention, spec=spec, operands=operands, **options)
        out, pull = jax.vjp(call, q, k, v)
        return pull(out)

    return jax.make_jaxpr(run)(x, x, x, operands)


def ids(n):
    return dict.fromkeys(SEGMENTS, jax.ShapeDtypeStruct((1, n), jnp.int32))


@pytest.mark.parametrize(
    "impl", ["xla", "tpu", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_packed_documents_at_a_hundred_thousand_tokens(impl):
    n = 98_304
    found = program(sa.causal() & sa.segments(), (1, n, 2, 16), ids(n), impl=impl)
    assert constants.computed_from_constants(found) == []
    # A byte a block in each of a few tables, or less.
    assert constants.literals(found) < 8 << 20


@pytest.mark.parametrize(
    "name",
    [
        n
        if n in ("moba", "vertical_slash")
        else pytest.param(n, marks=pytest.mark.slow)
        for n, case in content_cases.CASES.items()
        if n not in ("vmoba", "vmoba head", "biformer")  # grids of their own length
    ],
)
def test_content(name):
    """Small blocks stand for many: a table of them is more than ``most`` bytes."""
    case, n, block = content_cases.CASES[name], 2048, 16
    q = np.zeros((1, n, case.num_heads, case.head_dim), np.float32)
    config = sa.KernelConfig(block_q=block, block_kv=block)
    found = program(case.spec, q.shape, case.operands(q, q), config=config)
    most = 4 * (n // block) ** 2
    computed = constants.computed_from_constants(found, most)
    # Cells scored a step at a time: bounded by the step, whatever the length.
    assert [x for x in computed if x.name != "stack"] == []
    assert constants.literals(found) < 1 << 20


@pytest.mark.slow
def test_large_tables_are_made_at_run_time(monkeypatch):
    q = jnp.ones((2, 100, 1, 8))
    rows = np.sort(np.random.default_rng(0).integers(0, 5, (2, 100)), axis=1)
    given = dict.fromkeys(SEGMENTS, jnp.asarray(rows, jnp.int32))
    spec = sa.causal() & sa.segments() & ~sa.offsets({40, 41})

    def kinds(most):
        monkeypatch.setattr(plans, "MOST_BLOCKS", most)
        jax.clear_caches()
        plan = plan_for(spec, q, q, block_q=8, block_kv=8, operands=given)
        return block_mask.expand(plan.mask)

    np.testing.assert_array_equal(kinds(1), kinds(1 << 20))


def test_the_check_finds_what_is_computed():
    table = np.arange(512, dtype=np.int32)

    def run(x):
        def step(i, total):
            return total + jnp.sum(
                jnp.cumsum(jnp.asarray(table)[:, None] * table[None], 1)
            )

        return jax.lax.fori_loop(0, 2, step, jnp.int32(0)) + x

    found = constants.computed_from_constants(jax.make_jaxpr(run)(1), 1 << 19)
    assert {x.name for x in found} == {"mul", "cumsum"}
