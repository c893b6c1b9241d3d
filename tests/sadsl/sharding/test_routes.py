"""All keys of all shards: gathered, in a ring, by heads; queries that move."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from sharded_calls import Case, arrays, compared, floats, ids, integers_of

import sadsl as sa
from lowering import pipeline
from lowering.partition.balance import balance, imbalance, work_by_rows
from lowering.partition.shards import Shards
from lowering.problem import Problem
from sadsl.sharding import routes

C = sa.causal()
LABELS = sa.where(lambda q, k: sa.operand("x")[q] == sa.operand("x")[k])
MESH = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
CASES = {
    "causal": Case(C, 64),
    "odd": Case(C, 61),
    "full": Case(sa.full(), 40),
    "documents": Case(C & sa.segments(), 64, None, ids),
    "a learned sink": Case(sa.softmax(C, sink=True), 64,
                           lambda n: {"sink": floats(3)}),
    "alibi": Case(sa.softmax(C, bias=sa.alibi()), 64),
    "a bias of keys": Case(sa.softmax(C, bias=sa.key_bias("b")), 64,
                           lambda n: {"b": floats(2, 3, n)}),
    "a bias of pairs": Case(sa.softmax(C, bias=sa.pair_bias("b")), 64,
                            lambda n: {"b": floats(3, n, n)}),
    "labels": Case(C & LABELS, 64, lambda n: {"x": integers_of(n)}),
    "by head": Case(sa.per_head(C, sa.full(), C), 64),
    "local linear": Case(sa.local_linear(C, ridge=2.0), 64),
    "heads of terms": Case(sa.heads((C, 1), (sa.full(), 2)), 64),
}  # fmt: skip


def both(case, **options):
    if case.operands is not None:
        options["operands"] = case.operands(case.n)
    if case.options is not None:
        options |= case.options(case.n)

    def sharded(q, k, v):
        where = {"mesh": MESH, "sequence": "seq"}
        return sa.sharded_attention(q, k, v, case.spec, **where, **options)

    return sharded, lambda q, k, v: sa.attention(q, k, v, case.spec, **options)


@pytest.mark.parametrize("moves", [False, True], ids=["contiguous", "balanced"])
@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(8)
@pytest.mark.usefixtures("quick")
def test_gathers_and_rings(name, way, moves, monkeypatch):
    if way == "ring":
        monkeypatch.setattr(routes, "MOST_GATHERED", 0)
    if not moves:
        monkeypatch.setattr(routes, "balance", lambda maps, shards: None)
    jax.clear_caches()
    case = CASES[name]
    compared(*both(case), arrays(case.n, 3, 3))


@pytest.mark.usefixtures("quick")
def test_dropout_and_a_traced_scale_in_a_ring(monkeypatch):
    monkeypatch.setattr(routes, "MOST_GATHERED", 0)
    jax.clear_caches()
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(1)}
    sharded, whole = both(Case(C, 64), **options)
    compared(sharded, whole, arrays(64, 3, 3))

    def scaled(scale):
        where = {"mesh": MESH, "sequence": "seq", "sm_scale": scale}
        return sa.sharded_attention(*arrays(64, 3, 3), C, **where).sum()

    found = jax.jit(jax.grad(scaled))(0.3)
    wanted = jax.grad(lambda s: sa.attention(*arrays(64, 3, 3), C, sm_scale=s).sum())(
        0.3
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["causal", "odd", "documents", "topk by block"])
@pytest.mark.usefixtures("quick")
def test_heads_for_tokens(name):
    cases = {**CASES, "topk by block": Case(C & sa.topk(2, block=4, block_q=4), 41)}
    case = cases[name]
    sharded, whole = both(case)
    inputs = arrays(case.n, heads=8, kv_heads=4)
    text = jax.jit(sharded).lower(*inputs).as_text()
    assert "all_to_all" in text
    if name != "documents":
        assert "all_gather" not in text
    compared(sharded, whole, inputs)


def maps_of(spec, n):
    return pipeline.run(spec.node, Problem(n, n, 1))["simplify"].maps


def test_a_causal_map_is_dealt_in_a_zigzag():
    found = balance(maps_of(C, 4096), Shards(8, 4096, 4096))
    assert found is not None
    assert found.before == pytest.approx(1.9, abs=0.05)
    assert found.after == pytest.approx(1.0, abs=0.01)
    assert {frozenset(pair) for pair in found.chunks} == {
        frozenset({i, 15 - i}) for i in range(8)
    }


@pytest.mark.parametrize("spec", [sa.full(), C & sa.window(100), sa.blocks(64)])
def test_even_maps_stay(spec):
    assert balance(maps_of(spec, 4096), Shards(8, 4096, 4096)) is None


def test_every_chunk_has_one_shard_and_work_is_counted_in_pairs():
    n, spec = 1024, C & (sa.window(300) | sa.strided(64))
    shards = Shards(8, n, n)
    work = work_by_rows(maps_of(spec, n), shards, 64)
    dense = np.asarray(spec.dense(n))[0].reshape(16, 64, -1, shards.granule)
    visited = dense.any(axis=(1, 3)).sum(axis=1)
    full = dense.all(axis=(1, 3)).sum(axis=1)
    np.testing.assert_allclose(work, (visited + full) / 2)
    by_shard = work.reshape(8, 2).sum(axis=1)
    assert imbalance(maps_of(spec, n), shards) == pytest.approx(
        by_shard.max() / by_shard.mean(), rel=0.1
    )
    both = maps_of(spec, n) + maps_of(C, n)
    np.testing.assert_allclose(
        work_by_rows(both, shards, 64), work + work_by_rows(both[1:], shards, 64)
    )
    found = balance(maps_of(C, n), shards)
    assert sorted(c for pair in found.chunks for c in pair) == list(range(16))
