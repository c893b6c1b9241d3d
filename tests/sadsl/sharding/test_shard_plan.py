"""``shard_plan`` counts what the compiled program sends."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from sharded_calls import arrays

import sadsl as sa

C = sa.causal()
MESH = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
SHAPE = re.compile(r"tensor<([0-9x]+)x(f32|i32)>")


def sent(spec, n, operands=None):
    """The bytes that a device receives of others, read from the lowered program."""
    call = lambda *x: sa.sharded_attention(
        *x, spec, mesh=MESH, sequence="seq", operands=operands
    )
    text = jax.jit(call).lower(*arrays(n, batch=1)).as_text()
    total = 0
    for line in text.splitlines():
        known = re.search(r'stablehlo\.(collective_permute|all_gather)"', line)
        shapes = SHAPE.findall(line.split("->")[-1])
        if known and shapes:
            size = 4 * int(np.prod([int(x) for x in shapes[-1][0].split("x")]))
            share = 3 / 4 if known[1] == "all_gather" else 1
            total += round(size * share)
        if "stablehlo.all_reduce" in line:
            total += 0
    return total


@pytest.mark.parametrize(
    ("spec", "n"),
    [
        (C & sa.window(9), 64),
        (C & sa.window(40), 128),
        (sa.where(lambda q, k: abs(q - k) <= 20), 128),
        (sa.where(lambda q, k: (q - k == 64) | (q == k)), 128),
        (sa.full(), 64),
    ],
)
def test_the_bytes_of_the_program(spec, n):
    found = sa.shard_plan(spec, n, 4, num_heads=2, head_dim=8, dtype="float32")
    assert sent(spec, n) == found.received


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
