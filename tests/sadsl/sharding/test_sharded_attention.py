"""A sharded call equals the call on one device, in values and gradients."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from sharded_calls import Case, arrays, compared, floats, ids, integers_of

import sadsl as sa

C = sa.causal()
SEQUENCE = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
NEAR_AND_SINKS = C & (sa.window(9) | sa.sinks(2))
LABELS = sa.where(lambda q, k: sa.operand("x")[q] == sa.operand("x")[k])
HALVES = sa.where(lambda q, k: sa.operand("y")[k // 2] > 0)
CASES = {
    "window": Case(C & sa.window(9)),
    "both sides": Case(sa.where(lambda q, k: abs(q - k) <= 11), 100),
    "wide halo": Case(C & sa.window(20), 33),
    "sinks": Case(NEAR_AND_SINKS, 100),
    "a learned sink": Case(
        sa.softmax(NEAR_AND_SINKS, sink=True), 100, lambda n: {"sink": floats(2)}
    ),
    "sinks of queries": Case(
        sa.softmax(C & sa.window(5), sink=True), 50,
        lambda n: {"sink": floats(2, n, 2)},
    ),
    "sends": Case(sa.where(lambda q, k: (q - k == 32) | (q == k)), 128),
    "sends and all else": Case(C & (sa.window(3) | sa.strided(32)), 128),
    "blocks": Case(sa.blocks(16), 120),
    "causal": Case(C, 57),
    "full": Case(sa.full(), 13),
    "shorter than the mesh": Case(C & sa.window(2), 5),
    "one token": Case(C, 1),
    "alibi": Case(sa.softmax(C & sa.window(20), bias=sa.alibi()), 100),
    "a bias of keys": Case(
        sa.softmax(C & sa.window(20), bias=sa.key_bias("b")), 77,
        lambda n: {"b": floats(2, 2, n)},
    ),
    "a bias of pairs": Case(
        sa.softmax(C & sa.window(20), bias=sa.pair_bias("b")), 77,
        lambda n: {"b": floats(2, n, n)},
    ),
    "soft cap": Case(sa.softmax(C & sa.window(6), logits_soft_cap=3.0)),
    "labels of queries and keys": Case(LABELS & sa.window(9), 61,
                                       lambda n: {"x": integers_of(n)}),
    "an array by block": Case(C & HALVES, 61,
                              lambda n: {"y": integers_of(n)[:, : n // 2 + 1]}),
    "documents": Case(C & sa.segments(), 131, None, ids),
    "documents in a window": Case(C & sa.segments() & sa.window(9), 130, None, ids),
    "no key at all": Case(C & sa.window(3) & sa.where(lambda q, k: q < 20), 61),
    "gated": Case(sa.gated(C & sa.window(4), C), 50,
                  lambda n: {"gates": floats(2, n, 2, 2)}),
    "joint": Case(sa.joint(sa.softmax(C & sa.window(4), bias=sa.alibi()),
                           C & sa.strided(16)), 64),
    "average": Case(sa.average(C & sa.window(4), sa.blocks(8)), 40),
    "heads": Case(sa.heads((C & sa.window(4), 1), (sa.blocks(8), 1)), 40),
    "by head": Case(sa.per_head(C & sa.window(4), sa.blocks(8)), 40),
    "topk by query": Case(C & sa.topk(2, block=4, block_q=1), 41),
    "topk by block": Case(C & sa.topk(2, block=4, block_q=4), 41),
    "local linear": Case(sa.local_linear(NEAR_AND_SINKS, ridge=0.5), 100),
    "entries": Case(
        sa.over("e", sa.where(lambda q, k: (k <= q // 6) & (sa.operand("ok")[k] > 0)
                              & (k <= sa.operand("most")[q]))), 61,
        lambda n: {"e": floats(2, 10, 2, 8), "ok": integers_of(10),
                   "most": integers_of(n) * 4},
    ),
    "linear": Case(sa.linear("elu1")),
    "linear with decays": Case(sa.linear("elu1", decay=(0.9, 0.5)), 64),
    "linear by document": Case(
        sa.linear("elu1", decay=0.9, map=C & sa.segments()), 61, None, ids
    ),
    "linear both ways": Case(sa.linear("elu1", map=sa.full()), 29),
    "delta": Case(sa.delta(), 61, lambda n: {"beta": abs(floats(2, n, 2)) % 1}),
    "delta by document": Case(
        sa.delta(map=C & sa.segments()), 61,
        lambda n: {"beta": abs(floats(2, n, 2)) % 1}, ids,
    ),
}  # fmt: skip


@pytest.mark.sample(9)
@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("quick")
def test_eight_shards_equal_one_device(name, impl):
    case = CASES[name]
    options = {} if case.options is None else case.options(case.n)
    if case.operands is not None:
        options["operands"] = case.operands(case.n)
    options["impl"] = impl

    def sharded(q, k, v):
        where = {"mesh": SEQUENCE, "sequence": "seq"}
        return sa.sharded_attention(q, k, v, case.spec, **where, **options)

    def whole(q, k, v):
        return sa.attention(q, k, v, case.spec, **options)

    compared(sharded, whole, arrays(case.n))


# --- heads and batch ---

MESHES = {
    "heads": ((4,), {"heads": "h"}, "h"),
    "batch and heads": ((2, 2), {"batch": "b", "heads": "h"}, "bh"),
    "all three": ((2, 2, 2), {"batch": "b", "heads": "h", "sequence": "s"}, "bhs"),
    "batch and sequence": ((2, 4), {"batch": "b", "sequence": "s"}, "bs"),
}
OF_HEADS = {
    "window": Case(C & sa.window(9)),
    "by head": Case(sa.per_head(C & sa.window(4), sa.blocks(8)), 40),
    "of the head": Case(C & sa.where(lambda q, k, h: q - k <= 2 * h + 1)),
    "an array of heads": Case(
        C & sa.where(lambda q, k, h: q - k <= sa.operand("w")[h]), 61,
        lambda n: {"w": np.arange(4, dtype=np.int32) * 3},
    ),
    "alibi": Case(sa.softmax(C & sa.window(20), bias=sa.alibi()), 40),
    "t5": Case(sa.softmax(C, bias=sa.t5_bias()), 24,
               lambda n: {"bias": floats(4, 32)}),
    "sinks": Case(sa.softmax(C & (sa.window(9) | sa.sinks(2)), sink=True), 61,
                  lambda n: {"sink": floats(4)}),
    "heads of maps": Case(sa.heads((C & sa.window(4), 1), (sa.blocks(8), 3)), 40),
    "gated": Case(sa.gated(C & sa.window(4), C), 40,
                  lambda n: {"gates": floats(2, n, 4, 2)}),
    "documents": Case(C & sa.segments(), 61, None, ids),
    "decays": Case(sa.linear("elu1", decay=(0.9, 0.5, 0.8, 0.7)), 40),
    "delta": Case(sa.delta(), 40, lambda n: {"beta": abs(floats(2, n, 4)) % 1}),
    "topk": Case(C & sa.topk(2, block=4, block_q=1), 41),
}  # fmt: skip


@pytest.mark.sample(6)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.usefixtures("quick")
def test_batch_heads_and_sequence_together(name, mesh):
    case = OF_HEADS[name]
    sizes, where, names = MESHES[mesh]
    devices = jax.make_mesh(
        sizes, tuple(names), axis_types=(AxisType.Auto,) * len(sizes)
    )
    options = {} if case.options is None else case.options(case.n)
    if case.operands is not None:
        options["operands"] = case.operands(case.n)

    def sharded(q, k, v):
        return sa.sharded_attention(
            q, k, v, case.spec, mesh=devices, **where, **options
        )

    def whole(q, k, v):
        return sa.attention(q, k, v, case.spec, **options)

    compared(sharded, whole, arrays(case.n, heads=4, kv_heads=4))
