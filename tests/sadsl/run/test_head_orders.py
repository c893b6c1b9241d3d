"""Heads whose maps want different orders run apart, with the same results."""

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import pipeline
from lowering.order import judge, relayout
from sadsl import catalog
from sadsl.run import head_orders

AXIAL = catalog.axial(h=16, w=8)
SPECS = {
    "axial": (AXIAL, 128, 4, 2),
    "axial, offset": (AXIAL, 128, 2, 2),
    "dilations": (catalog.longformer(24, dilations=(1, 2, 4)), 256, 6, 3),
    "strides": (sa.per_head(sa.causal() & sa.strided(8), sa.window(8, 8)), 141, 4, 2),
}
CASES = [*((name, "xla") for name in SPECS), ("axial", "tpu"), ("axial", "triton")]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Any gain pays, however small the problem."""
    monkeypatch.setattr(relayout, "PAYS", 0)
    caches = (
        relayout.arrange,
        relayout.apart,
        pipeline.arrange,
        head_orders._ranges,
    )
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def arrays(n, heads, kv_heads, dim=16):
    rng = np.random.default_rng(7)
    shapes = (n, heads), (n, kv_heads), (n, kv_heads)
    return [jnp.asarray(rng.normal(size=(2, *s, dim)), jnp.float32) for s in shapes]


def loss(spec, impl, **options):
    config = sa.KernelConfig(block_q=16, block_kv=16)

    def of(q, k, v):
        out, lse = sa.attention(
            q, k, v, spec, impl=impl, return_lse=True, config=config, **options
        )
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.vdot(weights, out) + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    return of


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_values_and_gradients_are_those_of_one_call(name, impl):
    spec, n, heads, kv_heads = SPECS[name]
    options = {"operands": {"sink": jnp.linspace(-1, 1, heads)}}
    spec = sa.softmax(spec, 2.0, sink=True)
    if "offset" in name:
        options["q_offset"] = 5
    q, k, v = arrays(n, heads, kv_heads)
    q = q[:, 5:] if "offset" in name else q
    backend = {x: y for x, y in calls.BACKENDS[impl].items() if x == "interpret"}
    found = jax.value_and_grad(loss(spec, impl, **options, **backend), (0, 1, 2))
    parts = sa.lower(
        spec, q, k, v, config=sa.KernelConfig(block_q=16, block_kv=16), **options
    ).parts
    assert len(parts) > 1
    assert len({part.stages.layouts for part in parts}) > 1
    true = jax.value_and_grad(loss(spec, "reference", **options), (0, 1, 2))
    for a, b in zip(
        jax.tree.leaves(found(q, k, v)), jax.tree.leaves(true(q, k, v)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def maps_of(spec, n, heads):
    program = pipeline.run(spec.node, pipeline.Problem(n, n, heads))["simplify"]
    return judge.Maps(program.maps, program.map_of_head), program.sizes_in(16, 16)


def test_ranges_split_no_group_of_heads_that_share_a_key_head():
    maps, sizes = maps_of(AXIAL, 128, 6)
    assert relayout.apart(maps, sizes, 1) == (range(3), range(3, 6))
    assert relayout.apart(maps, sizes, 3) == (range(3), range(3, 6))
    assert relayout.apart(maps, sizes, 2) == (range(6),)


@pytest.mark.parametrize(
    "spec",
    [
        sa.causal(),
        # All want one order.
        sa.per_head(sa.strided(8), sa.causal() & sa.strided(8)),
        # They take turns: each would be a call of its own.
        sa.per_head(*(3 * [sa.strided(8), sa.window(8, 8)])),
    ],
    ids=["one map", "one order", "turns"],
)
def test_heads_stay_together_where_orders_of_their_own_save_little(spec):
    maps, sizes = maps_of(spec, 128, 6)
    assert relayout.apart(maps, sizes) == (range(6),)


def test_the_blocks_of_the_parts_are_fewer():
    spec, n, heads = AXIAL, 128, 4
    maps, sizes = maps_of(spec, n, heads)
    joint = relayout._visited(maps, sizes)
    own = [relayout._visited(maps.of_heads(r), sizes) for r in (range(2), range(2, 4))]
    assert sum(own) <= relayout.FEWER * joint


def test_calls_whose_arrays_count_all_heads_stay_one():
    q, k, v = arrays(128, 4, 4)
    config = sa.KernelConfig(block_q=16, block_kv=16)

    def parts(spec, **options):
        options = {"config": config} | options
        return len(sa.lower(spec, q, k, v, **options).parts)

    assert parts(AXIAL) == 2
    assert (
        parts(AXIAL, config=sa.KernelConfig(block_q=16, block_kv=16, relayout=False))
        == 1
    )
    assert parts(sa.softmax(AXIAL, bias=sa.alibi())) == 1
    wide = {"operands": {"w": jnp.full(4, 9, jnp.int32)}}
    near = sa.where(lambda q, k, h: q - k <= sa.operand("w")[h])
    assert parts(AXIAL & near, **wide) == 1
