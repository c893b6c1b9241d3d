"""``shard_plan`` counts what the compiled program sends."""

import jax
import pytest
from jax.sharding import AxisType
from sharded_calls import arrays

import sadsl as sa
from lowering.targets.collectives import received

C = sa.causal()
MESH = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))


def sent(spec, n, heads):
    """The bytes that a device receives of others, read from the compiled program."""
    call = lambda *x: sa.sharded_attention(*x, spec, mesh=MESH, sequence="seq")
    inputs = arrays(n, heads, heads, batch=1)
    return received(jax.jit(call).lower(*inputs).compile().as_text())


@pytest.mark.parametrize(
    ("spec", "n", "heads"),
    [
        (C & sa.window(9), 64, 2),
        (C & sa.window(40), 128, 2),
        (sa.where(lambda q, k: abs(q - k) <= 20), 128, 2),
        (sa.where(lambda q, k: (q - k == 64) | (q == k)), 128, 2),
        (C & (sa.window(9) | sa.sinks(2)), 128, 2),
        (sa.full(), 64, 2),
        (sa.full(), 64, 4),
        (C & sa.topk(2, block=4, block_q=4), 64, 2),
    ],
)
@pytest.mark.usefixtures("quick")
def test_the_bytes_of_the_program(spec, n, heads):
    found = sa.shard_plan(spec, n, 4, num_heads=heads, head_dim=8, dtype="float32")
    assert sent(spec, n, heads) == found.received


@pytest.mark.usefixtures("quick")
def test_queries_that_move_are_counted_once():
    """The program has four permutes of half a shard; a device takes part in two."""
    found = sa.shard_plan(C, 128, 4, num_heads=2, head_dim=8, dtype="float32")
    moved = found.received - found.all_keys
    assert sent(C, 128, 2) == found.all_keys + 2 * moved


def test_each_part_has_its_route():
    spec = sa.gated(C & sa.window(64), sa.linear("elu1"), C & sa.blocks(512))
    found = sa.shard_plan(spec, 4096, 8, num_heads=2)
    hows = [part.how for part in found.parts]
    assert hows == ["halo of 64 keys before and 0 after", "the state, in a scan",
                    "nothing"]  # fmt: skip
    assert found.received == sum(part.received for part in found.parts)


def test_routes_by_bytes():
    few = sa.shard_plan(C, 1 << 16, 8, num_heads=4)
    assert few.parts[0].how == "all keys, gathered; queries moved"
    assert 1 <= few.imbalance < 1.05
    many = sa.shard_plan(C, 1 << 16, 8, num_heads=32, num_kv_heads=8)
    assert many.parts[0].how == "heads for tokens, an all-to-all"
    assert many.received == many.by_heads < many.all_keys
    long = sa.shard_plan(C, 1 << 21, 256, num_heads=4, head_dim=128)
    assert long.parts[0].how == "all keys, in a ring; queries moved"
    choice = sa.shard_plan(C & sa.topk(2, block=64, block_q=64), 4096, 8)
    assert choice.parts[0].how == "all tokens; each device does all work"


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_shards=0"):
        sa.shard_plan(C, 64, 0)
    with pytest.raises(ValueError, match="has 64 positions"):
        sa.shard_plan(sa.Grid(h=8, w=8).neighborhood(3), 100, 4)
