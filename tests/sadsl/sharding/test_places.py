"""The maps of a shard, at the places of its keys, select the pairs of the whole map."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import composed

from lowering import ir, pipeline
from lowering.partition.exchange import exchange
from lowering.partition.shards import Shards
from lowering.problem import Problem
from sadsl.sharding.over_keys import AT_SLOTS, SLOT, span_places
from sadsl.terms.moved import OFFSET, Moved


def received(found, s):
    """The positions of the keys of shard ``s``: side by side, and of others, -1: none.

    Written from the meaning of an exchange, without devices.
    """
    shards, g = found.shards, found.shards.granule
    first = s * shards.kv_size - found.before * g
    last = (s + 1) * shards.kv_size + found.after * g
    near = np.arange(first, last)
    granules = list(found.shared)
    for send in found.sends:
        sender = (s - send.distance) % shards.count
        of = [x for x in send.granules[sender] if x >= 0]
        granules += [sender * shards.granules + x for x in of]
    far = (np.array(granules, int)[:, None] * g + np.arange(g)).reshape(-1)
    there = ((far < first) | (far >= last)) & (far < shards.kv_seq_len)
    return near, np.where(there, far, -1)


@given(composed(), st.integers(9, 70), st.sampled_from([2, 4]))
def test_own_and_received_keys_hold_all_pairs_once(spec, n, count):
    shards = Shards(count, n, n)
    maps = pipeline.run(spec.node, Problem(n, n, 1))["simplify"].maps
    found = exchange(maps, shards)
    if found.everything:
        return
    wanted = np.asarray(spec.dense(n))[0]
    for s in range(count):
        near, far = received(found, s)
        rows = np.arange(s * shards.q_size, min(n, (s + 1) * shards.q_size))
        if not len(rows):
            continue
        seen = np.zeros((len(rows), n), int)
        places = span_places(shards, found)
        parts = [(near, places)] + ([(far, AT_SLOTS)] if len(far) else [])
        for keys, at in parts:
            moved = Moved(spec, replace(at, length=n))
            arrays = {OFFSET: np.int32(s * shards.q_size), SLOT: keys.astype(np.int32)}
            read = {name: arrays[name] for name in ir.operand_names(moved.node)}
            dense = np.asarray(moved.dense(len(rows), len(keys), operands=read))[0]
            for j, key in enumerate(keys):
                if 0 <= key < n:
                    seen[:, key] += dense[:, j]
                else:
                    assert not dense[:, j].any()
        np.testing.assert_array_equal(seen, wanted[rows])
