"""Run-time plans are sound on random maps and content, and exact where analysis is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import ir, pipeline
from lowering.run_time import pair_bits, plans
from lowering.run_time.pair_groups import key_groups
from lowering.run_time.vectors import vectors_of
from pallas_kernels import dense
from pallas_kernels.block_mask import EMPTY, FULL, blank, check, expand, from_blocks
from pallas_kernels.call import PairBits, Vectors

HEADS, BATCH = 2, 2
SPECS = {
    "ids": "segments() & causal()",
    "spans": "where(lambda q, k, h: (q - k <= operand('span')[h]) & (k <= q))",
    "bare": "where(lambda q, k: (k < operand('prefix')) | (k * 2 <= q))",
    "cells": "where(lambda q, k, h: operand('cells')[h, q // 5, k // 7] == 1)",
    "wide": "window(9) - where(lambda q, k: operand('wide')[q // 64, k // 64] > 1)",
    "slash": "where(lambda q, k, h: operand('slash')[h, maximum(q - k, 0)] <= 0)",
    "heads": "per_head(window(9), where(lambda q, k: operand('x')[k] % 3 == 0))",
    "large": "where(lambda q, k: operand('big')[q] - operand('big')[k] <= 1)",
    "scaled": "where(lambda q, k: operand('x')[q] * 100 <= k)",
}


def operands(rng, n):
    """Some values for every array that the specs read; ids ascend."""
    ids = np.sort(rng.integers(0, 4, (BATCH, n)), axis=1)
    found = {"q_segment_ids": ids, "kv_segment_ids": ids}
    found |= {
        "span": rng.integers(0, n, (BATCH, HEADS)),
        "prefix": rng.integers(0, n, BATCH),
        "cells": rng.integers(0, 2, (BATCH, HEADS, n // 5 + 1, n // 7 + 1)),
        "wide": rng.integers(0, 3, (1, n // 64 + 1, n // 64 + 1)),
        "slash": np.sort(rng.integers(0, 2, (BATCH, HEADS, n)), axis=-1),
        "x": np.sort(rng.integers(0, n // 30 + 2, (BATCH, n)), axis=-1),
        "big": np.sort(rng.integers(-(2**30), 2**30, (1, n)), axis=-1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in found.items()}


def lowered(text, n):
    return pipeline.run(sa.parse(text).node, pipeline.Problem(n, n, HEADS))


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def planned(stages, given, n, blocks, by):
    program = stages["hoist"]
    vectors = Vectors(
        vectors_of(program.q_vectors, n, HEADS, given),
        vectors_of(program.kv_vectors, n, HEADS, given),
        pair_bits.pack(program.bits, (n, n), blocks[1], HEADS, given, blocks[:1]),
    )
    mask = plans.plan(stages, *blocks, vectors, by)
    return mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full, vectors


def host_mask(stages, given, n, blocks, by="q"):
    """The plan of every batch entry and head on the host, [entry, head] of its maps."""
    *arrays, vectors = planned(stages, given, n, blocks, by)
    like = {}

    def owners():
        mask = plans.plan(stages, *blocks, vectors, by)
        like["mask"] = mask
        return mask.row_ptr

    jax.eval_shape(owners)
    ptr, start, stop, full = (np.asarray(x) for x in arrays)
    count = ptr[-1]
    assert len(start) >= count
    mask = like["mask"]
    names = ("row_ptr", "run_start", "run_stop", "run_full")
    values = (ptr, start[:count], stop[:count], full[:count])
    for name, value in zip(names, values, strict=True):
        object.__setattr__(mask, name, value)
    check(mask)
    owner = np.broadcast_to(mask.map_of_head.reshape(-1, HEADS), (BATCH, HEADS))
    return mask, owner


def pairs_of(text, given, n, b):
    """The pairs of one batch entry."""
    names = sa.plan(text, 1, num_heads=HEADS, relayout=False).operands
    mine = {x: np.asarray(given[x])[min(b, len(given[x]) - 1)] for x in names}
    return sa.parse(text).dense(n, num_heads=HEADS, operands=mine)


@pytest.mark.sample(4)
@pytest.mark.parametrize("n", [70, 130])
@pytest.mark.parametrize("name", SPECS)
def test_never_misses_a_pair_and_never_calls_full_what_is_not(name, n):
    rng = np.random.default_rng(n)
    given, blocks = operands(rng, n), (16, 32)
    stages = lowered(SPECS[name], n)
    mask, owner = host_mask(stages, given, n, blocks)
    kinds, skipped = expand(mask)[owner], 0
    cell = np.kron(kinds, np.ones((1, 1, *blocks), np.int8))[:, :, :n, :n]
    for b in range(BATCH):
        pairs = pairs_of(SPECS[name], given, n, b)
        assert not np.any((cell[b] == EMPTY) & pairs)
        assert not np.any((cell[b] == FULL) & ~pairs)
        skipped += np.sum(cell[b] == EMPTY)
    static = pipeline.block_mask(stages, *blocks)
    assert mask.max_blocks == static.max_blocks
    if name in ("ids", "spans", "bare", "slash", "wide"):
        before = expand(static)[static.map_of_head]
        assert np.sum(kinds == EMPTY) > BATCH * np.sum(before == EMPTY)


def test_sorted_ids_leave_exactly_the_blocks_that_hold_a_pair():
    n, blocks = 256, (16, 16)
    given = operands(np.random.default_rng(3), n)
    text = "segments()"
    mask, owner = host_mask(lowered(text, n), given, n, blocks)
    kinds = expand(mask)[owner]
    for b in range(BATCH):
        pairs = pairs_of(text, given, n, b).reshape(HEADS, 16, 16, 16, 16)
        np.testing.assert_array_equal(kinds[b] != EMPTY, pairs.any(axis=(2, 4)))
        np.testing.assert_array_equal(kinds[b] == FULL, pairs.all(axis=(2, 4)))


@pytest.mark.parametrize("name", ["cells", "ids"])
def test_key_rows_are_the_query_rows_turned(name):
    n, blocks = 130, (16, 32)
    given = operands(np.random.default_rng(0), n)
    stages = lowered(SPECS[name], n)
    rows, _ = host_mask(stages, given, n, blocks)
    columns, _ = host_mask(stages, given, n, blocks, "kv")
    assert columns.by == "kv"
    turned = np.swapaxes(expand(rows), 1, 2)
    np.testing.assert_array_equal(expand(columns), turned)


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(3))
def test_runs_of_a_table_of_kinds(seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, (3, 5, 8), p=[0.4, 0.3, 0.3]).astype(np.int32)
    like = blank(5 * 16, 8 * 16, 16, 16)
    heads = np.arange(3, dtype=np.int32)
    wanted = from_blocks(kinds, map_of_head=heads, like=like)
    found = plans.from_kinds(jnp.asarray(kinds), plans.Owners(heads, heads), wanted)
    np.testing.assert_array_equal(found.row_ptr, wanted.row_ptr)
    count = wanted.row_ptr[-1]
    for a, b in (("run_start",) * 2, ("run_stop",) * 2, ("run_full",) * 2):
        np.testing.assert_array_equal(getattr(found, a)[:count], getattr(wanted, b))


@pytest.mark.sample(1)
@pytest.mark.parametrize("n", [13, 130])
@pytest.mark.parametrize("text", [SPECS["cells"], SPECS["slash"], SPECS["wide"]])
def test_bits_hold_what_the_comparison_says(text, n):
    given = operands(np.random.default_rng(n), n)
    stages = lowered(text, n)
    program = stages["hoist"]
    (found,) = pair_bits.pack(program.bits, (n, n), 32, HEADS, given, (32,))
    held = np.asarray(dense.unpacked(found, n))
    # In normal form, what is taken away is what does not hold.
    alone = "where(lambda q, k: operand('wide')[q // 64, k // 64] <= 1)"
    text = alone if "wide" in text else text
    for b in range(len(held)):
        np.testing.assert_array_equal(
            np.broadcast_to(held[b], (HEADS, n, n)), pairs_of(text, given, n, b)
        )


def test_one_word_holds_the_columns_of_many_blocks():
    """512 keys to a column, 128 to a block: 128 blocks fit one word."""
    column = ir.Operand("t", (ir.Q, ir.FloorDiv(ir.K, 512)))
    found = key_groups(ir.Eq(column, ir.Const(1)), 1 << 15, 128)
    assert found.blocks == 128
    assert found.member.shape == (2, 32)
    alone = ir.Operand("t", (ir.Q, ir.K))
    found = key_groups(ir.Eq(alone, ir.Const(1)), 1 << 10, 128)
    assert found.blocks == 1
    assert found.member.shape == (8, 128)


@pytest.mark.slow
def test_blocks_in_bits():
    """Some and every bit of each block, of a table with a ragged last column."""
    n, block = 100, 32
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.random((1, 1, 4, 10)) < 0.5).at[0, 0, 0, :4].set(True)
    pred = sa.parse(
        "where(lambda q, k: operand('t')[0 * q, q // 32, k // 10] == 1)"
    ).node
    (found,) = pair_bits.pack((pred,), (n, n), block, 1, {"t": table}, (block,))
    assert isinstance(found, PairBits)
    some, every = pair_bits.held_in_blocks(found, block, n)
    pairs = np.kron(np.asarray(table[0, 0]), np.ones((32, 10), bool))[:n, :n]
    padded = np.pad(pairs, ((0, 28), (0, 28)))
    by_block = padded.reshape(4, 32, 4, 32)
    np.testing.assert_array_equal(some[0, 0], by_block.any(axis=(1, 3)))
    real = np.pad(pairs, ((0, 28), (0, 28)), constant_values=True)
    np.testing.assert_array_equal(
        every[0, 0], real.reshape(4, 32, 4, 32).all(axis=(1, 3))
    )
