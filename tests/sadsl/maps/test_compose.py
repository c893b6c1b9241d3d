"""``a @ b`` equals the boolean product of the dense maps."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import ir

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

SUPPRESS = list(HealthCheck)
SIZES = [1, 7, 13, 40, 65]
GRID = sa.Grid(h=4, w=6)
# Maps on a grid: composed among each other and with maps of the line.
ON_GRID = [
    GRID.neighborhood(3),
    GRID.neighborhood((3, 5), stride=(2, 3)),
    GRID.neighborhood(2, dilation=(1, 2)),
    GRID.neighborhood((2, 3), causal=True),
    GRID.neighborhood((2, 3), stride=(1, 2), causal=(False, True)),
    GRID.axial("w"),
    GRID.axial("h"),
    GRID.product(h=sa.causal(), w=sa.window(1, 1)),
    GRID.product(w=sa.blocks(3)) | GRID.axial("h"),
]


def product(a, b):
    """Some middle position: the definition."""
    return (a.astype(int) @ b.astype(int)) > 0


def assert_product(a, b, n, num_heads=1):
    dense = (x.dense(n, num_heads=num_heads) for x in (a, b))
    np.testing.assert_array_equal(
        (a @ b).dense(n, num_heads=num_heads), product(*dense)
    )


small, count = st.integers(0, 9), st.integers(1, 9)
leaves = st.one_of(
    st.just(sa.causal()),
    st.builds(sa.window, small, small),
    st.builds(sa.sinks, small),
    st.tuples(small, small).map(lambda ab: sa.keys(*sorted(ab))),
    st.tuples(small, small).map(lambda ab: sa.queries(*sorted(ab))),
    st.builds(sa.strided, st.sampled_from([1, 2, 3, 4, 6])),
    st.builds(sa.dilated, small, small, st.integers(1, 4)),
    st.builds(sa.blocks, count),
    st.builds(sa.offsets, st.sets(st.integers(-9, 9), max_size=3)),
    st.builds(lambda w, b: sa.window(w, 1).lift(b), small, count),
)
maps = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: a.T, inner),
        st.builds(lambda a: ~a, leaves),
    ),
    max_leaves=4,
)


@settings(max_examples=few(120), suppress_health_check=SUPPRESS)
@given(maps, maps)
def test_random_maps(a, b):
    try:
        (a @ b).node  # noqa: B018
    except NotImplementedError as error:
        # Only by the number of cases may this family be refused.
        assert "cases, more than" in str(error)  # noqa: PT017
        assume(False)
    for n in SIZES:
        assert_product(a, b, n)


def test_grids():
    for a, b in itertools.pairwise([*ON_GRID, sa.window(4), ON_GRID[0], sa.sinks(2)]):
        assert_product(a, b, 24)
        assert_product(b, a, 24)
        assert_product(a, a, 24)


def test_grids_with_extra_positions_and_three_axes():
    with_text = GRID.neighborhood(3, extra=3)
    assert_product(with_text, with_text, 27)
    video = sa.Grid(t=3, h=4, w=5).neighborhood((2, 3, 3), stride=(1, 2, 3))
    assert_product(video, video, 60)


def test_powers_are_associative():
    near = sa.window(2) | sa.sinks(1)
    for n in (1, 13, 40):
        twice = product(near.dense(n), near.dense(n))
        expected = product(twice, near.dense(n))
        np.testing.assert_array_equal((near @ near @ near).dense(n), expected)
        np.testing.assert_array_equal((near @ (near @ near)).dense(n), expected)


def test_the_middle_is_a_key():
    """With more queries than keys, and fewer, ``j`` runs over the keys."""
    a, b = sa.window(0, 5), sa.window(3)
    for n, m in ((20, 9), (9, 20)):
        expected = product(a.dense(n, m)[0], b.dense(m, m)[0])
        np.testing.assert_array_equal((a @ b).dense(n, m)[0], expected)


def test_heads_combine_one_by_one():
    two = sa.per_head(sa.window(3), sa.strided(3))
    three = sa.per_head(sa.sinks(2), sa.window(1), sa.blocks(4))
    mixed = sa.causal() & sa.per_head(sa.window(2, 2), sa.full())
    for a, b in ((two, two), (two, three), (two, sa.window(2)), (sa.causal(), mixed)):
        assert_product(a, b, 13, num_heads=6)
    shifted = sa.where(lambda q, k, h: q - k == h)
    assert_product(shifted, two, 13, num_heads=6)
    with pytest.raises(ValueError, match="do not divide 4 heads"):
        (two @ three).dense(5, num_heads=4)


def test_lifted():
    """Blocks hop to blocks: the middle runs over the blocks of the keys."""
    a = sa.window(1, 1) @ sa.window(1, 0)
    for n in SIZES:
        blocks = -(-n // 4)
        inner = product(
            sa.window(1, 1).dense(blocks)[0], sa.window(1, 0).dense(blocks)[0]
        )
        at = np.arange(n) // 4
        expected = inner[at[:, None], at[None, :]]
        np.testing.assert_array_equal(a.lift(4).dense(n)[0], expected)


def test_it_plans_like_any_map():
    spec = sa.causal() & (sa.window(5) @ sa.strided(4))
    plan = sa.plan(spec, 130, block_q=16, block_kv=16, exact=True)
    dense = spec.dense(130)[0]
    assert plan.num_pairs == dense.sum()
    padded = np.zeros((144, 144), bool)
    padded[:130, :130] = dense
    tiles = padded.reshape(9, 16, 9, 16).any(axis=(1, 3))
    assert plan.num_full + plan.num_partial == tiles.sum()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (sa.causal() @ sa.window(3), "causal() @ window(3)"),
        (sa.causal() @ sa.sinks(1) @ sa.full(), "causal() @ sinks(1) @ full()"),
        (sa.causal() @ (sa.sinks(1) @ sa.full()), "causal() @ (sinks(1) @ full())"),
        (sa.causal() & sa.sinks(2) @ sa.full(), "causal() & (sinks(2) @ full())"),
        ((sa.causal() & sa.sinks(2)) @ sa.full(), "(causal() & sinks(2)) @ full()"),
        (~sa.causal() @ sa.sinks(3), "~causal() @ sinks(3)"),
        (~(sa.causal() @ sa.sinks(3)), "~(causal() @ sinks(3))"),
        ((sa.causal() @ sa.sinks(3)).T, "(causal() @ sinks(3)).T"),
        ((sa.causal() @ sa.sinks(3)).lift(4), "(causal() @ sinks(3)).lift(4)"),
    ],
)
def test_text(spec, text):
    assert repr(spec) == text
    assert sa.parse(text) == spec
    assert hash(sa.parse(text)) == hash(spec)


def test_at_binds_tighter_than_and():
    assert sa.parse("causal() & sinks(2) @ full()") == sa.causal() & (
        sa.sinks(2) @ sa.full()
    )


@pytest.mark.parametrize(
    ("a", "b", "part"),
    [
        (sa.segments(), sa.causal(), r"operand\('kv_segment_ids'\)\[j\]"),
        (
            sa.where(lambda q, k: sa.power_of_two(q - k)),
            sa.causal(),
            r"cannot solve `power_of_two\(q - j\)` for j",
        ),
        (sa.causal(), sa.window(1).permute(range(99)), r"table"),
    ],
)
def test_what_cannot_be_eliminated(a, b, part):
    with pytest.raises(NotImplementedError, match=part) as error:
        (a @ b).dense(9)
    assert "multiply the dense maps" in str(error.value)


def test_what_they_ask_of_the_length_stays():
    with pytest.raises(ValueError, match="a grid"):
        (GRID.axial("w") @ GRID.axial("h")).dense(23)
    # Both fulfil every pair, and still it is a map of 24 positions.
    with pytest.raises(ValueError, match="a grid"):
        (sa.full() @ GRID.axial("h", "w")).dense(23)
    looked_up = sa.where(lambda q, k: sa.table((1, 0, 1))[k] == 1)
    assert_product(looked_up, sa.full(), 3)
    with pytest.raises(ValueError, match="a table"):
        (looked_up @ sa.full()).dense(5)
    with pytest.raises(TypeError, match="unsupported operand"):
        sa.causal() @ 3


def test_operands_beside_the_middle_stay():
    """A run-time array that is indexed by the query is a condition on it."""
    spec = sa.where(lambda q, k: k <= sa.operand("stop")[q]) @ sa.window(2)
    stop = np.array([0, 3, 1, 4, 0])
    a = np.arange(5)[None, :] <= stop[:, None]
    dense = spec.dense(5, operands={"stop": stop})[0]
    np.testing.assert_array_equal(dense, product(a, sa.window(2).dense(5)[0]))
    assert ir.operand_names(spec.node) == ("stop",)
