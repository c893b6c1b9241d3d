"""Every mechanism decided by content: values and gradients, given what it chose."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from content_cases import CASES

import sadsl as sa

# Hardly optimised: what is at stake is which pairs are attended.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SMALL = sa.KernelConfig(block_q=16, block_kv=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case = CASES[name]
    rng = np.random.default_rng(7)
    shape = 2, case.n, case.num_heads, case.head_dim
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    given = dict(case.operands(np.asarray(q), np.asarray(k)))
    given = {name: jnp.asarray(x) for name, x in given.items()}

    @partial(jax.jit, compiler_options=QUICK)
    def call(q, k, v, do):
        chosen = sa.select(case.spec, q, k, operands=given)
        attend = partial(
            sa.attention, spec=case.spec, operands=given, impl="xla", config=SMALL
        )
        o, pull = jax.vjp(attend, q, k, v)
        return chosen, (o, *pull(do))

    chosen, found = call(q, k, v, do)
    by_batch = [
        case.spec.dense(
            case.n, num_heads=case.num_heads,
            operands={
                x: np.asarray(y)[min(b, len(y) - 1)]
                for x, y in chosen.items()
            },
        )
        for b in range(2)
    ]  # fmt: skip
    pairs = np.stack(by_batch)
    assert 0 < pairs.mean() < 1
    by_head = lambda x: np.swapaxes(np.asarray(x), 1, 2)
    wanted = oracle.with_gradients(
        *(by_head(x) for x in (q, k, v)), pairs, case.head_dim**-0.5, do=by_head(do)
    )
    expected = wanted.o, wanted.dq, wanted.dk, wanted.dv
    for a, b in zip(found, expected, strict=True):
        oracle.assert_close(by_head(a), b, "float32", name)
