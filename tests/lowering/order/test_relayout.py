"""An order of positions is a permutation, selects the same pairs and no more blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import ir, pipeline, planning
from lowering.expr import heads
from lowering.expr.evaluate import NumPy, evaluate
from lowering.expr.simplify import integer, simplify
from lowering.order import candidates, digits, relayout
from lowering.order.digit_parts import DigitParts
from lowering.order.judge import Judge
from lowering.order.layout import Axis, Layout
from pallas_kernels.block_mask import EMPTY, FULL, expand

SETTINGS = {"suppress_health_check": list(HealthCheck)}


@st.composite
def layouts(draw):
    """Any array, its axes cut into digits with some padding, in any order."""
    axes = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 5))
        low = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
        axes.append(Axis(size, (-(-size // int(np.prod(low, dtype=int))), *low)))
    cells = int(np.prod([a.size for a in axes]))
    count = sum(len(a.radices) for a in axes)
    order = tuple(draw(st.permutations(range(count))))
    length = draw(st.integers(max(1, cells - 3), cells))
    return Layout(length, tuple(axes), order)


def slots_by_definition(layout):
    """The position in every slot, digit by digit, or -1."""
    radices = [r for a in layout.axes for r in a.radices]
    found = []
    for slot in range(layout.num_slots):
        digit_of, rest = {}, slot
        for i in reversed(layout.order):
            digit_of[i] = rest % radices[i]
            rest //= radices[i]
        position, first, inside = 0, 0, True
        for axis in layout.axes:
            coordinate = 0
            for i in range(first, first + len(axis.radices)):
                coordinate = coordinate * radices[i] + digit_of[i]
            inside &= coordinate < axis.size
            position = position * axis.size + coordinate
            first += len(axis.radices)
        found.append(position if inside and position < layout.length else -1)
    return np.array(found)


@pytest.mark.slow
@settings(max_examples=few(20), **SETTINGS)
@given(layouts())
def test_slots_and_positions_match_one_to_one(layout):
    positions = slots_by_definition(layout)
    np.testing.assert_array_equal(layout.positions, positions)
    layout.check()
    x = np.arange(2 * layout.length * 3).reshape(2, layout.length, 3)
    there = np.asarray(layout.to_slots(jnp.asarray(x), 1))
    np.testing.assert_array_equal(
        there[:, positions >= 0], x[:, positions[positions >= 0]]
    )
    assert not there[:, positions < 0].any()
    back = layout.to_positions(jnp.asarray(there), 1)
    np.testing.assert_array_equal(back, x)


def test_what_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match=r"order=\(0, 0\) must name each of the 2"):
        Layout(12, (Axis(3, (3,)), Axis(4, (4,))), (0, 0))
    with pytest.raises(ValueError, match=r"cannot hold 13 positions"):
        Layout(13, (Axis(3, (3,)), Axis(4, (4,))), (0, 1))
    with pytest.raises(ValueError, match=r"cannot hold 12 positions"):
        Layout(12, (Axis(3, (2,)), Axis(4, (4,))), (0, 1))


@settings(max_examples=few(100), **SETTINGS)
@given(strategies.composed(), layouts(), layouts())
def test_a_map_in_slots_selects_the_same_pairs(spec, q, kv):
    (node,) = heads.per_head(spec.node, 1)
    pairs = spec.dense(q.length, kv.length)[0]
    slots = np.arange(q.num_slots)[:, None], np.arange(kv.num_slots)[None, :]
    written = digits.in_slots(simplify(node), q, kv)
    found = np.broadcast_to(
        evaluate(written, NumPy(*slots)), (q.num_slots, kv.num_slots)
    )
    live = np.ix_(q.positions >= 0, kv.positions >= 0)
    order = np.ix_(q.positions[q.positions >= 0], kv.positions[kv.positions >= 0])
    np.testing.assert_array_equal(found[live], pairs[order], err_msg=repr(spec))
    assert found.sum() == pairs.sum()


def test_digits_are_written_back_exactly():
    layout = Layout(60, (Axis(5, (5,)), Axis(12, (3, 4))), (2, 0, 1))
    slots = np.arange(layout.num_slots)
    found = layout.digits(ir.Q)
    row, high, low = (evaluate(integer(found[i]), NumPy(slots, 0)) for i in range(3))
    np.testing.assert_array_equal(row * 12 + high * 4 + low, layout.positions)


@pytest.fixture
def eager(monkeypatch):
    """Any gain pays, however small the problem, and none is foreseen to be none."""
    monkeypatch.setattr(relayout, "PAYS", 0)
    monkeypatch.setattr(relayout, "SURELY_NOT", 2)
    caches = relayout.arrange, pipeline.arrange
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


GRID = sa.Grid(h=12, w=14)
MAPS = {
    "strided": (sa.causal() & sa.strided(7), 168, 2),
    "dilated": (sa.dilated(6, 3, 5) | sa.sinks(2), 168, 1),
    "columns": (sa.where(lambda q, k: k % 8 == 5) & sa.causal(), 168, 1),
    "grid": (GRID.neighborhood(5, stride=(1, 2)), 168, 1),
    "odd grid": (sa.Grid(h=11, w=13).neighborhood((3, 6)), 143, 1),
    "grid dilated": (GRID.neighborhood(3, dilation=(3, 4)), 168, 1),
    "axis": (GRID.axial("h") | sa.window(3, 3), 168, 1),
    "heads": (sa.per_head(sa.strided(6), sa.causal() & sa.strided(6)), 168, 4),
    "segments": (sa.segments() & sa.strided(6), 168, 1),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("block", [8, 20])
def test_plans_in_slots_are_sound_and_no_larger(name, block, eager):
    spec, n, num_heads = MAPS[name]
    stages = pipeline.run(spec.node, pipeline.Problem(n, n, num_heads))
    moved = pipeline.arrange(stages, block, block)
    if moved.layouts is None:
        assert (name, block) in (("heads", 20), ("axis", 20), ("axis", 8))
        return
    before = pipeline.block_mask(stages, block, block)
    after = pipeline.block_mask(moved, block, block)
    assert after.visited_by_map().sum() <= before.visited_by_map().sum()
    q, kv = moved.layouts
    for m, node in enumerate(moved.planned.maps):
        if ir.operand_names(node):
            continue
        at = NumPy(np.arange(q.num_slots)[:, None], np.arange(kv.num_slots)[None])
        pairs = np.broadcast_to(evaluate(node, at), (q.num_slots, kv.num_slots))
        kinds = np.repeat(np.repeat(expand(after)[m], block, 0), block, 1)
        kinds = kinds[: q.num_slots, : kv.num_slots]
        assert not np.any(pairs & (kinds == EMPTY))
        assert not np.any(~pairs & (kinds == FULL))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "impl"),
    [(name, "xla") for name in MAPS]
    + [
        (name, impl)
        for name in ("strided", "odd grid", "segments")
        for impl in ("tpu", "triton")
    ],
)
def test_attention_in_another_order_is_the_same(name, impl, eager):
    spec, n, num_heads = MAPS[name]
    rng = np.random.default_rng(0)
    q, do = rng.normal(size=(2, 1, n, 2 * num_heads, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, n, num_heads, 8)).astype(np.float32)
    ids = np.sort(rng.integers(0, 3, n)).astype(np.int32)
    operands = {"q_segment_ids": ids, "kv_segment_ids": ids}
    operands = operands if name == "segments" else {}
    pairs = spec.dense(n, num_heads=2 * num_heads, operands=operands)[None]
    config = sa.KernelConfig(block_q=16, block_kv=16)

    def run(q, k, v):
        return sa.attention(
            q, k, v, spec, return_lse=True, impl=impl, interpret=impl != "xla",
            config=config, **operands,
        )  # fmt: skip

    (o, lse), pull = jax.vjp(run, q, k, v)
    found = o, lse, *pull((jnp.asarray(do), jnp.zeros_like(lse)))
    turned = [np.swapaxes(x, 1, 2) for x in (q, k, v)]
    wanted = oracle.with_gradients(*turned, pairs, 8**-0.5, do=np.swapaxes(do, 1, 2))
    for field, value, x in zip(oracle.Result._fields, wanted, found, strict=True):
        x = x if field == "lse" else np.swapaxes(x, 1, 2)
        oracle.assert_close(x, value, np.float32, f"{field} of {name}")


def test_the_order_is_an_option_and_lower_prints_it():
    spec = sa.causal() & sa.strided(32)
    shapes = [jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.float32)] * 3
    lowered = sa.lower(spec, *shapes)
    assert "order of q: [a:64 b:32] -> [b:32 a:64]" in str(lowered)
    assert "in the given order" in str(lowered.plan)
    fixed = sa.lower(spec, *shapes, config=sa.KernelConfig(relayout=False))
    assert fixed.plan.layouts is None
    assert "order of q" not in str(fixed)
    given_plan = sa.plan(spec, 2048, relayout=False)
    assert given_plan.layouts is None
    assert sa.plan(spec, 2048).given == (given_plan.num_full, given_plan.num_partial)
    assert sa.plan(spec, 2048).num_pairs == given_plan.num_pairs


def bound(plan):
    """Blocks that the pairs would fill."""
    return -(-plan.num_pairs // (plan.mask.block_q * plan.mask.block_kv))


@pytest.mark.parametrize(
    ("spec", "n"),
    [
        (sa.strided(16), 65_536),
        (sa.strided(100), 51_200),
        (sa.causal() & sa.strided(32), 65_536),
        (sa.dilated(1023, 0, 16), 65_536),
        (sa.dilated(1024, 1024, 8), 65_536),
    ],
    ids=repr,
)
def test_strides_and_dilations_come_close_to_their_bound(spec, n):
    plan = sa.plan(spec, n)
    visited = plan.num_full + plan.num_partial
    assert visited <= 1.15 * bound(plan)
    assert sum(plan.given) > 5 * visited


@pytest.mark.parametrize(
    ("grid", "window", "stride", "dilation", "block"),
    [
        (sa.Grid(h=256, w=256), 33, 1, 1, 128),
        (sa.Grid(h=64, w=64), 7, 1, 8, 64),
        (sa.Grid(h=64, w=64), 24, 8, 1, 64),
        (sa.Grid(t=16, h=32, w=32), 12, 4, 1, 64),
        (sa.Grid(t=16, h=32, w=32), (6, 12, 12), (2, 4, 4), 1, 32),
    ],
)
def test_neighborhoods_visit_less_than_half_of_the_blocks(
    grid, window, stride, dilation, block
):
    spec = grid.neighborhood(window, stride=stride, dilation=dilation)
    plan = sa.plan(spec, grid.size, block_q=block, block_kv=block)
    assert 2 * (plan.num_full + plan.num_partial) <= sum(plan.given)


def test_an_order_that_saves_too_little_is_not_taken():
    spec = sa.Grid(h=64, w=64).neighborhood(7)
    assert sa.plan(spec, 4096, block_q=16, block_kv=16).layouts is None
    assert sa.plan(spec, 4096).layouts is None


def test_maps_without_digits_stay_as_they_are():
    for spec in (sa.causal(), sa.causal() & (sa.window(512) | sa.sinks(64))):
        assert sa.plan(spec, 4096).layouts is None


def test_ranges_of_digits_in_blocks_hold_every_slot():
    side = digits.Side("q", 96, (Axis(12, (3, 4)), Axis(8, (8,))))
    first = Layout(96, (Axis(12, (3, 4)), Axis(8, (8,))), (1, 0, 2))
    cut = Layout(96, (Axis(12, (3, 4)), Axis(8, (3, 3))), (2, 0, 3, 1))
    parts = DigitParts([first, cut], side)
    for of, layout in enumerate((first, cut)):
        at = np.arange(layout.num_slots)
        found = layout.digits(ir.Q)
        own = [evaluate(integer(found[i]), NumPy(at, 0)) for i in range(len(found))]
        if layout is cut:
            own = [own[0], own[1], 3 * own[2] + own[3]]
        for block in (1, 5, 16):
            number = np.arange(-(-layout.num_slots // block))
            ranges = parts.ranges(np.full(len(number), of), number, block)
            for digit, (low, high) in zip(own, ranges, strict=True):
                least = np.minimum.reduceat(digit, number * block)
                greatest = np.maximum.reduceat(digit, number * block)
                assert (low <= least).all()
                assert (high >= greatest).all()
                if block == 1:
                    np.testing.assert_array_equal(low, digit)
                    np.testing.assert_array_equal(high, digit)


@pytest.mark.parametrize("spec", [sa.window(40), sa.causal() & sa.strided(8)])
def test_the_judge_counts_exactly_where_it_looks_at_all_rows(spec):
    n, sizes = 1024, planning.BlockSizes(1024, 1024, 128, 8)
    stages = pipeline.run(spec.node, pipeline.Problem(n, n, 1))
    maps = relayout.Maps(tuple(stages.planned.maps), (0,))
    judge = Judge(maps, digits.read_sides(maps.nodes, n, n), sizes)
    every = [candidates.given(judge.sides), *candidates.fronts(judge.sides)]
    for layouts, found in zip(every, judge._estimates(every, 1000), strict=True):
        arranged = relayout.write(maps, layouts)
        counted = relayout.count(
            arranged.nodes, (1,), relayout.slots_of(layouts, sizes)
        )
        assert found == counted.visited
        assert judge._estimates([layouts], 1000) == [found]
