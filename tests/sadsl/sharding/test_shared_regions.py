"""``summaries`` over shards: regions are pooled where their tokens are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import sadsl as sa
from lowering.targets.collectives import collectives, received
from sadsl import catalog

MESH = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
# Specs, and lengths for which the shards hold whole regions.
SPECS = {
    "spans": (sa.summaries(sa.spans(4)), 64),
    "other spans": (sa.summaries(sa.spans(2, causal=False), pool="mean"), 61),
    "a short last span": (sa.summaries(sa.spans(4)), 63),
    "rows": (sa.summaries(sa.rows(4, causal=False), pool="sum", phi="relu"), 64),
    "tokens of rows": (sa.summaries(sa.rowmajor(4, key="wsum")), 64),
    "Combiner-Fixed": (catalog.combiner_fixed(8), 128),
    "existing keys": (sa.summaries(sa.spans(2), valid="there"), 61),
    "shards without whole regions": (sa.summaries(sa.spans(3)), 64),
    "columns": (sa.summaries(sa.columns(4)), 64),
    "a function": (sa.summaries(sa.spans(4), phi="phi"), 64),
}


def arrays(n, kv_heads=2):
    rng = np.random.default_rng(3)
    shapes = ((2, n, h, 8) for h in (4, kv_heads, kv_heads))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def calls(name, **options):
    """The call over shards, and that on one device."""
    spec, n = SPECS[name]
    if name == "existing keys":
        options["operands"] = {"there": (np.arange(n) % 7 < 4).astype(np.int32)}
    if name == "a function":
        options["operands"] = {"phi": lambda x: jnp.cumsum(x, axis=1)}

    def sharded(*x):
        where = {"mesh": MESH, "sequence": "seq"}
        return sa.sharded_attention(*x, spec, **where, **options)

    return sharded, lambda *x: sa.attention(*x, spec, **options)


@pytest.mark.sample(4)
@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.usefixtures("quick")
def test_eight_shards_equal_one_device(name, impl):
    inputs = arrays(SPECS[name][1])
    for call in zip(*(outputs(x, inputs) for x in calls(name, impl=impl)), strict=True):
        np.testing.assert_allclose(*call, rtol=3e-5, atol=3e-5)


def outputs(call, inputs):
    out, pull = jax.vjp(jax.jit(call), *inputs)
    return (out, *pull(jnp.cos(out)))


@pytest.mark.usefixtures("quick")
def test_dropout_drops_the_same_regions():
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(1)}
    inputs = arrays(128)
    found, wanted = (x(*inputs) for x in calls("Combiner-Fixed", **options))
    np.testing.assert_allclose(found, wanted, rtol=3e-5, atol=3e-5)


def test_only_regions_are_gathered():
    sharded, _ = calls("Combiner-Fixed")
    inputs = arrays(SPECS["Combiner-Fixed"][1], kv_heads=4)
    hlo = jax.jit(sharded).trace(*inputs).lower().compile().as_text()
    # 16 regions of 8 tokens, in two batch entries with four heads of 8 channels.
    found = {(each.kind, *each.shapes) for each in collectives(hlo)}
    assert {kind for kind, *_ in found} == {"all-gather"}
    assert all(np.prod(s) <= 2 * 16 * 4 * 8 for _, *shapes in found for s in shapes)
    spec, n = SPECS["Combiner-Fixed"]
    plan = sa.shard_plan(spec, n, 8, num_heads=4, head_dim=8, dtype="float32")
    assert received(hlo) == len(inputs[0]) * plan.received
    assert "16 regions, gathered" in str(plan)


@pytest.mark.parametrize(
    ("partition", "sizes"),
    [
        (sa.spans(4), (4, 8, 12)),
        (sa.spans(6, causal=False), (6, 12)),
        (sa.rows(4), (4, 8, 12)),
        (sa.rows(6, part="before"), (6, 12)),
        (sa.rowmajor(4), (4, 8, 12)),
        (sa.columns(4), ()),
        (sa.tower(), ()),
    ],
    ids=str,
)
def test_parts_that_have_their_own_regions(partition, sizes):
    assert tuple(x for x in (4, 6, 8, 12) if partition.divides(x)) == sizes
    for size in sizes:
        part, whole = (
            partition.members(n).dense(partition.num_regions(n), n)[0]
            for n in (size, 3 * size)
        )
        np.testing.assert_array_equal(whole, np.kron(np.eye(3, dtype=bool), part))
