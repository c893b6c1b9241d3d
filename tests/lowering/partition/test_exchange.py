"""What shards need and receive, against the dense map and a simulated wire."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import composed

import sadsl as sa
from lowering import pipeline
from lowering.partition.exchange import Exchange, exchange
from lowering.partition.needs import needs
from lowering.partition.shards import Shards
from lowering.problem import Problem

CAUSAL = sa.causal()


def nodes_of(spec, shards, num_heads=1):
    problem = Problem(shards.q_seq_len, shards.kv_seq_len, num_heads)
    return pipeline.run(spec.node, problem)["simplify"].maps


def dense_needs(spec, shards, num_heads=1):
    """The granules that each shard needs, bool ``[shards, granules]``, pair by pair."""
    dense = spec.dense(shards.q_seq_len, shards.kv_seq_len, num_heads=num_heads)
    dense = np.asarray(dense).any(axis=0)
    total = shards.count * shards.granules
    found = np.zeros((shards.count, total), bool)
    for q, k in np.argwhere(dense):
        found[q // shards.q_size, k // shards.granule] = True
    return found


def received(found):
    """The granules that each shard has after an exchange, bool ``[shards, granules]``.

    Written from the meaning of the fields, shard by shard.
    """
    shards = found.shards
    count, size = shards.count, shards.granules
    has = np.zeros((count, count * size), bool)
    for s in range(count):
        first, stop = s * size - found.before, (s + 1) * size + found.after
        has[s, max(0, first) : max(0, stop)] = True
        has[s, list(found.shared)] = True
        if found.everything:
            has[s] = True
        for send in found.sends:
            sender = (s - send.distance) % count
            sent = [g for g in send.granules[sender] if g >= 0]
            has[s, [sender * size + g for g in sent]] = True
    return has


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@given(composed(), st.integers(1, 90))
def test_every_needed_granule_arrives(count, spec, n):
    shards = Shards(count, n, n)
    maps_of_heads = nodes_of(spec, shards)
    wanted = dense_needs(spec, shards)
    runs = needs(maps_of_heads, shards)
    planned = np.zeros_like(wanted)
    for s, start, stop in zip(*runs, strict=True):
        planned[s, start:stop] = True
    assert not (wanted & ~planned).any()
    found = exchange(maps_of_heads, shards)
    assert not (wanted & ~received(found)).any()
    assert found.received <= Exchange(shards, everything=True).received


@pytest.mark.parametrize(
    ("spec", "n", "count", "wanted"),
    [
        (sa.blocks(64), 512, 8, "nothing"),
        (CAUSAL & sa.window(60), 1024, 8, "halo of 64 keys before and 0 after"),
        (sa.where(lambda q, k: abs(q - k) <= 8), 512, 8,
         "halo of 8 keys before and 8 after"),
        (CAUSAL & (sa.window(128) | sa.sinks(4)), 1 << 14, 8,
         "halo of 128 keys before and 0 after, 128 shared keys"),
        # A halo that is wider than a shard.
        (CAUSAL & sa.window(300), 4096, 32, "halo of 304 keys before and 0 after"),
        (CAUSAL, 4096, 8, "all keys"),
        (sa.full(), 4096, 8, "all keys"),
        # Two shards before, not the one between.
        (sa.where(lambda q, k: (q - k == 512) | (q == k)), 2048, 8,
         "256 keys from 1 distances"),
    ],
)  # fmt: skip
def test_known_exchanges(spec, n, count, wanted):
    shards = Shards(count, n, n)
    found = exchange(nodes_of(spec, shards), shards)
    assert str(found) == wanted


def test_the_cost_of_a_window_does_not_grow_with_the_shards():
    spec = CAUSAL & sa.window(1024)
    each = []
    for count in (64, 256, 512):
        shards = Shards(count, 1 << 20, 1 << 20)
        each.append(exchange(nodes_of(spec, shards), shards).received)
    assert each == [1024] * 3


def test_padding_is_less_than_a_sixteenth_or_one_key():
    for count in (1, 2, 3, 8, 13):
        for n in range(1, 400):
            shards = Shards(count, n, n)
            size = -(-n // count)
            assert shards.kv_size - size <= size // 16
            assert shards.count * shards.kv_size >= n
            assert shards.kv_size % shards.granule == 0


def test_keys_of_several_steps_stay_with_their_query():
    for n in (1, 13, 130, 257):
        shards = Shards(8, n, 3 * n)
        assert shards.ratio == 3
        assert shards.kv_size == 3 * shards.q_size


@given(composed(), st.integers(20, 90))
def test_traffic_counts_the_keys_of_other_shards(spec, n):
    shards = Shards(4, n, n)
    found = exchange(nodes_of(spec, shards), shards)
    has = received(found).reshape(4, 4, shards.granules).sum(axis=2)
    np.fill_diagonal(has, 0)
    wanted = has * shards.granule
    # A granule that arrives twice, as a shared one in a halo, counts twice.
    assert (found.traffic >= wanted).all()
    assert ((found.traffic > 0) == (wanted > 0)).all()
