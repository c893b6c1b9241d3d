"""The plan of the TPU's backward kernel, against a table of all blocks."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import Case, Pattern

from pallas_kernels import dispatch
from pallas_kernels.block_mask import EMPTY, FULL, PARTIAL, blank, expand, from_blocks
from pallas_kernels.tpu import chips, runs, segments
from pallas_kernels.tpu.pair_test import pair_test
from pallas_kernels.tpu.segments import ADDS, CLOSES, OPENS, WRITES

BLOCK = 16
# The bytes of dq of one block, for the head_dim below.
HEAD_DIM = 8
UNIT = 4 * BLOCK * HEAD_DIM


def random_mask(rng, maps, heads, rows, columns, density):
    """A mask by keys: ``rows`` key blocks, ``columns`` query blocks."""
    kinds = rng.choice(
        [EMPTY, PARTIAL, FULL], p=[1 - density, density / 2, density / 2],
        size=(maps, rows, columns),
    )  # fmt: skip
    kinds = np.repeat(kinds, 2, axis=2)[:, :, :columns]
    of_head = rng.permutation(np.arange(heads) % maps)
    like = blank(columns * BLOCK - 3, rows * BLOCK - 5, BLOCK, BLOCK, "kv")
    return from_blocks(kinds.astype(np.int8), map_of_head=of_head, like=like)


def rows_of(plan, key_head):
    """The rows of a key head: key block, flags, number of the segment."""
    at = plan.first_place[key_head % len(plan.first_place)]
    words = plan.places.reshape(-1, 2)[at : at + plan.num_rows]
    return [(r, column, word & 15, word >> 4) for r, (column, word) in enumerate(words)]


def blocks_of(plan, query_head, row):
    """The blocks that a query head visits in a row, with their kinds."""
    at = plan.first_row[query_head % len(plan.first_row)] + row
    begin, end = plan.row_runs.reshape(-1, 2)[at]
    for first, stop in plan.runs.reshape(-1, 2)[begin:end]:
        for block in range(first >> 1, stop):
            yield block, FULL if first & 1 else PARTIAL


def check(plan, mask, heads, group):
    kinds, maps = expand(mask), np.asarray(mask.map_of_head)
    parts = plan.segments
    assert parts.group == group
    assert parts.blocks * parts.of_head >= mask.num_q_blocks
    for key_head in range(heads // group):
        found = np.zeros((group, *kinds.shape[1:]), np.int8)
        opened, written = [], []
        for row, column, flags, number in rows_of(plan, key_head):
            chunk, segment = divmod(int(number), parts.of_head)
            if flags & OPENS:
                opened.append(number)
            assert number == opened[-1]
            if not flags & WRITES:
                assert flags == 0
            else:
                assert bool(flags & ADDS) == (column in written)
                written.append(column)
            for part in range(parts.members):
                member = chunk * parts.members + part
                for block, kind in blocks_of(plan, key_head * group + member, row):
                    assert block // parts.blocks == segment
                    assert found[member, column, block] == EMPTY
                    found[member, column, block] = kind
        assert opened == list(range(parts.count))
        closed = [n for *_, flags, n in rows_of(plan, key_head) if flags & CLOSES]
        assert closed == opened
        assert set(written) == set(range(mask.num_rows))
        of_group = maps[(key_head * group + np.arange(group)) % len(maps)]
        np.testing.assert_array_equal(found, kinds[of_group])


@pytest.mark.parametrize("resident", [1, 3, 8, 1000])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_rows_cover_every_block_once(group, resident, monkeypatch):
    monkeypatch.setattr(segments, "RESIDENT_BYTES", resident * UNIT)
    rng = np.random.default_rng(group + resident)
    for maps, rows, columns, density in [(1, 5, 9, 0.4), (3, 7, 4, 0.2), (2, 1, 1, 0)]:
        mask = random_mask(rng, maps, 8, rows, columns, density)
        plan = segments.plan_of(mask, group, HEAD_DIM)
        assert plan.table is None
        assert plan.segments.blocks * plan.segments.members <= resident
        check(plan, mask, 8, group)


def test_a_list_that_does_not_fit_takes_larger_segments(monkeypatch):
    monkeypatch.setattr(segments, "RESIDENT_BYTES", UNIT)
    monkeypatch.setattr(runs, "SCALAR_BYTES", 700)
    mask = random_mask(np.random.default_rng(0), 1, 1, 6, 12, 0.9)
    plan = segments.plan_of(mask, 1, HEAD_DIM)
    assert plan.table is None
    assert 1 < plan.segments.blocks < 12
    check(plan, mask, 1, 1)


def test_a_list_that_never_fits_becomes_a_table(monkeypatch):
    monkeypatch.setattr(runs, "SCALAR_BYTES", 200)
    monkeypatch.setattr(chips, "vmem_bytes", lambda: 4 * 4 * UNIT)
    mask = random_mask(np.random.default_rng(0), 1, 1, 6, 12, 0.9)
    plan = segments.plan_of(mask, 1, HEAD_DIM)
    assert plan.places is None
    assert plan.segments == segments.QuerySegments(4, 3, 1, 1)
    assert plan.num_rows == 3 * 6


def test_a_large_group_is_split():
    mask = random_mask(np.random.default_rng(0), 1, 1, 3, 3, 0.5)
    wide = replace(mask, block_q=1024, q_seq_len=3000)
    plan = segments.plan_of(wide, 128, 576)
    # dq of a block takes 2.25 MiB, so that a segment has one block of one head.
    assert (plan.segments.members, plan.segments.blocks) == (1, 1)
    assert plan.segments.count == 128 * 3


CASES = {str(x.values[0]): x.values[0] for x in kernel_cases.params()}
MAPS_OF_HEADS = CASES["two maps-h4/2-130x130-d16/16-float32-capNone"]
PADDED = CASES["sinks-h2/2-130x130-d24/40-float32-cap2.0"]
EMPTY_ROWS = CASES["empty-h4/2-130x130-d16/16-float32-capNone"]


@pytest.mark.usefixtures("quick_compilation")
class TestValues:
    """Segments of one or of two blocks: dk and dv are sums over several rows."""

    @pytest.mark.slow
    @pytest.mark.parametrize("resident", [1, 2])
    @pytest.mark.parametrize("case", [MAPS_OF_HEADS, PADDED, EMPTY_ROWS], ids=str)
    def test_lists(self, case, resident, monkeypatch):
        size = resident * 4 * case.dkv.block_q * (-(-case.dim // 8) * 8)
        monkeypatch.setattr(segments, "RESIDENT_BYTES", size)
        case.check("tpu", interpret=True)

    @pytest.mark.parametrize("case", [MAPS_OF_HEADS], ids=str)
    def test_tables(self, case, monkeypatch):
        monkeypatch.setattr(runs, "is_static", lambda _: False)
        monkeypatch.setattr(chips, "vmem_bytes", lambda: 1)
        case.check("tpu", interpret=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["on_wait", "eager"])
    def test_no_race(self, mode, monkeypatch):
        monkeypatch.setattr(segments, "RESIDENT_BYTES", 1)
        params = pltpu.InterpretParams(
            dma_execution_mode=mode, detect_races=True, out_of_bounds_reads="raise"
        )
        case = Case(q_heads=4, q_len=90, kv_len=70, pattern=Pattern("holes"))
        replace(case, batch=1).check("tpu", interpret=params)
        assert not interpret_pallas_call.races.races_found

    @pytest.mark.slow
    @pytest.mark.parametrize("key", [float("nan"), 3e38])
    def test_unseen_keys_may_hold_anything(self, key):
        """Their blocks then test all pairs."""
        case = Case(q_len=50, kv_len=50, pattern=Pattern("holes"))
        unseen = ~case.pairs().any(axis=(0, 1, 2))
        assert unseen.any()
        inputs, do, dlse = case.arrays()

        def gradients(inputs):
            def f(inputs):
                args = case.vectors(), case.masks(), case.call(interpret=True)
                return dispatch.attend(inputs, *args, impl="tpu")

            out, pull = jax.vjp(f, inputs)
            return pull(type(out)(do, dlse))

        poisoned = inputs._replace(
            k=jnp.where(unseen[:, None], key, inputs.k),
            v=jnp.where(unseen[:, None], key, inputs.v),
        )
        found = jax.jit(gradients)(poisoned), jax.jit(gradients)(inputs)
        jax.tree.map(np.testing.assert_array_equal, *found)


def test_counts_of_a_band():
    """Rows are those pairs of a segment and a key block that hold a run."""
    n = 40
    kinds = np.zeros((1, n, n), np.int8)
    for i in range(n):
        kinds[0, i, i : i + 3] = FULL
    like = blank(n * BLOCK, n * BLOCK, BLOCK, BLOCK, "kv")
    mask = from_blocks(kinds, map_of_head=np.zeros(1, np.int32), like=like)
    found = segments._listed(mask, segments.QuerySegments(10, 4, 1, 1))
    # A segment of 10 blocks sees its own keys and the two blocks before.
    assert Counter(w >> 4 for w in found.places[1::2]) == {0: 10, 1: 12, 2: 12, 3: 12}


@pytest.mark.usefixtures("quick_compilation")
def test_queries_without_keys_may_hold_anything():
    """Also behind the first rows of a block, under a test of several comparisons."""
    case = Case(batch=1, q_len=64, kv_len=64, pattern=Pattern("holes"))
    unseeing = ~case.pairs().any(axis=3)[0, 0]
    assert not unseeing[32:40].any()
    assert unseeing[40:].all()
    inputs, *_ = case.arrays()
    poisoned = inputs._replace(q=jnp.where(unseeing[:, None], jnp.nan, inputs.q))
    args = case.vectors(), case.masks(), case.call(interpret=True)
    sizes = runs.sizes_of(args[1].forward)
    assert pair_test(args[0], args[2], sizes, "q").several
    found, wanted = (dispatch.attend(x, *args, impl="tpu") for x in (poisoned, inputs))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
