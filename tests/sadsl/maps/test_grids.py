"""Maps of grids equal plain loops over the cells, as plans and as attention."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering import pipeline
from pallas_kernels.block_mask import EMPTY, FULL, expand

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


def window_of(i, length, window, stride, causal):
    """The keys of coordinate ``i``, as the published reference computes them."""
    left, right = window // 2, window // 2 + window % 2 - 1
    if causal:
        leader = min(i // stride * stride + stride - 1, length - 1)
        return range(max(leader - (window - 1), 0), min(i + 1, length))
    leader = min(i // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return range(start, start + window)


def neighbours(i, length, window, stride, dilation, causal):
    """The keys along one axis, among the coordinates of its residue class."""
    members = [j for j in range(length) if j % dilation == i % dilation]
    own = members.index(i)
    found = window_of(own, len(members), window, stride, causal)
    return {members[j] for j in found}


def neighborhood(shape, window, stride, dilation, causal, extra=0):
    """Every pair of a neighbourhood, cell by cell."""
    cells = list(itertools.product(*map(range, shape)))
    pairs = np.ones((len(cells) + extra,) * 2, bool)
    for row, q in enumerate(cells):
        rules = zip(q, shape, window, stride, dilation, causal, strict=True)
        near = [neighbours(*rule) for rule in rules]
        for column, k in enumerate(cells):
            pairs[row, column] = all(j in n for j, n in zip(k, near, strict=True))
    return pairs


def named(shape):
    return sa.Grid(**dict(zip("abcd", shape, strict=False)))


@st.composite
def rules(draw):
    """Shapes of at most some 150 cells with what a neighbourhood on them may be."""
    num_axes = draw(st.integers(1, 4))
    most = {1: 40, 2: 12, 3: 5, 4: 3}[num_axes]
    shape = [draw(st.integers(1, most)) for _ in range(num_axes)]
    dilation = [draw(st.integers(1, min(x, 4))) for x in shape]
    most = [x // d for x, d in zip(shape, dilation, strict=True)]
    window = [draw(st.integers(1, x)) for x in most]
    stride = [draw(st.integers(1, w)) for w in window]
    causal = [draw(st.booleans()) for _ in shape]
    extra = draw(st.sampled_from([0, 0, 3]))
    return *map(tuple, (shape, window, stride, dilation, causal)), extra


# Drawn by many tests: built once.
RULES = rules()


def assert_planned(spec, n, blocks=(16, 40)):
    """No pair is missed and no block is called full that is not."""
    pairs = spec.dense(n)[0]
    for block in blocks:
        stages = pipeline.run(spec.node, pipeline.Problem(n, n))
        kinds = expand(pipeline.block_mask(stages, block, block))[0]
        cell = np.kron(kinds, np.ones((block, block), int))[:n, :n]
        assert not np.any((cell == EMPTY) & pairs), f"missed pairs of {spec!r}"
        assert not np.any((cell == FULL) & ~pairs), f"false full block of {spec!r}"
    assert sa.plan(spec, n, block_q=16, block_kv=16).num_pairs == pairs.sum()


@settings(max_examples=few(250))
@given(RULES)
def test_neighborhoods_by_definition(rule):
    *axes, extra = rule
    spec = named(axes[0]).neighborhood(*axes[1:], extra=extra)
    n = spec.grid.size + extra
    expected = neighborhood(*axes, extra)
    np.testing.assert_array_equal(spec.dense(n)[0], expected, err_msg=repr(spec))
    assert sa.parse(repr(spec)) == spec
    assert sa.parse(repr(spec)).node == spec.node


@settings(max_examples=few(60))
@given(RULES)
def test_neighborhoods_are_planned(rule):
    shape, *options, extra = rule
    spec = named(shape).neighborhood(*options, extra=extra)
    assert_planned(spec, spec.grid.size + extra)


WORKED = [
    (6, 3, 2, False, "0-2 0-2 2-4 2-4 3-5 3-5"),
    (6, 3, 2, True, "0-0 0-1 1-2 1-3 3-4 3-5"),
    (8, 4, 2, False, "0-3 0-3 1-4 1-4 3-6 3-6 4-7 4-7"),
    (7, 5, 2, False, "0-4 0-4 1-5 1-5 2-6 2-6 2-6"),
]


@pytest.mark.parametrize(("length", "window", "stride", "causal", "rows"), WORKED)
def test_worked_rows(length, window, stride, causal, rows):
    spec = sa.Grid(x=length).neighborhood(window, stride, causal=causal)
    for row, seen in zip(rows.split(), spec.dense(length)[0], strict=True):
        first, last = map(int, row.split("-"))
        np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(first, last + 1))


@pytest.mark.parametrize("length", [1, 5, 13, 14])
def test_laws_of_neighborhoods(length):
    """A window's worth of keys and the own one; special cases that other maps have."""
    grid = sa.Grid(x=length)
    for window in range(1, length + 1):
        for stride in range(1, window + 1):
            dense = grid.neighborhood(window, stride).dense(length)[0]
            assert (dense.sum(axis=1) == window).all()
            assert np.diag(dense).all()
            dense = grid.neighborhood(window, stride, causal=True).dense(length)[0]
            assert (dense.sum(axis=1) <= window).all()
            assert np.diag(dense).all()
        sliding = grid.neighborhood(window, causal=True)
        expected = sa.causal() & sa.window(window - 1)
        np.testing.assert_array_equal(sliding.dense(length), expected.dense(length))
    everything = grid.neighborhood(length)
    assert everything.dense(length).all()
    causal = grid.neighborhood(length, causal=True).dense(length)
    np.testing.assert_array_equal(causal, sa.causal().dense(length))


def test_stride_of_the_window_is_blocks():
    spec = sa.Grid(x=12).neighborhood(4, 4)
    assert spec.dense(12)[0].tolist() == sa.blocks(4).dense(12)[0].tolist()
    simple = pipeline.run(spec.node, pipeline.Problem(12, 12))["simplify"]
    assert simple.maps == pipeline.run(
        sa.blocks(4).node, pipeline.Problem(12, 12)
    )["simplify"].maps  # fmt: skip


GRID = sa.Grid(t=3, h=4, w=5)
T, H, W = (np.arange(60) // 20, np.arange(60) // 5 % 4, np.arange(60) % 5)


def differ(x):
    return x[:, None] - x[None, :]


PRODUCTS = [
    (GRID.product(t=sa.causal()), differ(T) >= 0),
    (GRID.product(w=sa.window(1, 1), t=sa.offsets({0, 2})),
     (np.abs(differ(W)) <= 1) & np.isin(differ(T), [0, 2])),
    (GRID.product(t=sa.causal(), h=sa.strided(2), w=sa.blocks(2)),
     (differ(T) >= 0) & (differ(H) % 2 == 0) & (differ(W // 2) == 0)),
    (GRID.product(h=sa.sinks(2).T), (H < 2)[:, None] & np.ones(60, bool)),
    (GRID.product(h=sa.causal().permute([2, 0, 3, 1])),
     differ(np.array([2, 0, 3, 1])[H]) >= 0),
    (GRID.product(), np.ones((60, 60), bool)),
    (GRID.axial("w"), (differ(T) == 0) & (differ(H) == 0)),
    (GRID.axial("h"), (differ(T) == 0) & (differ(W) == 0)),
    (GRID.axial("t"), (differ(H) == 0) & (differ(W) == 0)),
    (GRID.axial("h", "t"), differ(W) == 0),
    (GRID.axial("t", "w"), differ(H) == 0),
    (GRID.axial("t", "h", "w"), np.ones((60, 60), bool)),
    (GRID.axial("h").T & GRID.product(h=sa.causal()),
     (differ(T) == 0) & (differ(W) == 0) & (differ(H) >= 0)),
    (sa.Grid(a=1, b=60, c=1).product(a=sa.causal(), b=sa.window(3)),
     (differ(np.arange(60)) >= 0) & (differ(np.arange(60)) <= 3)),
    (sa.Grid(a=1, b=60, c=1).axial("b"), np.ones((60, 60), bool)),
    (GRID.axial("w").lift(2), None),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), PRODUCTS, ids=lambda x: repr(x)[:60])
def test_products_and_axes(spec, expected):
    if expected is None:
        expected = GRID.axial("w").dense(60)[0].repeat(2, axis=0).repeat(2, axis=1)
    n = len(expected)
    np.testing.assert_array_equal(spec.dense(n)[0], expected)
    assert sa.parse(repr(spec)) == spec
    assert_planned(spec, n)


def test_an_axis_map_counts_the_cells_of_its_axis():
    """The number of keys means the size of the axis inside of a product."""
    from_end = sa.parse("where(lambda q, k, h, n: k >= n - 2)")
    spec = GRID.product(w=from_end)
    assert sa.parse(repr(spec)) == spec
    expected = np.broadcast_to(W >= 3, (60, 60))
    np.testing.assert_array_equal(spec.dense(60)[0], expected)
    np.testing.assert_array_equal(from_end.dense(9)[0, 0], np.arange(9) >= 7)


def test_extra_positions_see_all_and_all_see_them():
    maps = {
        "product": GRID.product(t=sa.causal(), extra=4),
        "table": GRID.product(t=sa.causal().permute([2, 0, 1]), extra=4),
        "axial": GRID.axial("w", extra=4),
        "full": GRID.product(extra=4),
    }
    for name, spec in maps.items():
        inside = sa.parse(repr(spec).replace("extra=4", "extra=0")).dense(60)[0]
        expected = np.ones((64, 64), bool)
        expected[:60, :60] = inside
        np.testing.assert_array_equal(spec.dense(64)[0], expected, err_msg=name)
        assert sa.parse(repr(spec)) == spec
        assert_planned(spec, 64)


def test_heads_along_an_axis():
    spec = GRID.product(w=sa.per_head(sa.causal(), sa.full()))
    dense = spec.dense(60, num_heads=4)
    np.testing.assert_array_equal(dense[1], differ(W) >= 0)
    assert dense[2].all()
    with pytest.raises(ValueError, match=r"a grid .* has 60 positions"):
        spec.dense(61, num_heads=4)


def test_grids_are_values():
    assert sa.Grid(t=3, h=4, w=5) == GRID
    assert sa.Grid(h=4, t=3, w=5) != GRID
    assert hash(GRID) == hash(sa.Grid(t=3, h=4, w=5))
    assert repr(GRID) == "Grid(t=3, h=4, w=5)"
    assert (GRID.size, GRID.shape, GRID.names) == (60, (3, 4, 5), ("t", "h", "w"))
    first = GRID.product(t=sa.causal(), w=sa.full())
    assert first == GRID.product(w=sa.full(), t=sa.causal())
    assert GRID.axial("w", "t") == GRID.axial("t", "w")
    assert GRID.neighborhood(3) == GRID.neighborhood([3, 3, 3], (1, 1, 1), causal=False)
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(AttributeError):
        GRID.axes = ()


@pytest.mark.parametrize(
    "text",
    [
        "Grid(t=8, h=16, w=16).neighborhood((3, 5, 5), causal=(True, False, False))",
        "Grid(x=64).neighborhood(8, stride=4, dilation=2, extra=3)",
        "Grid(t=3, h=4).product(t=causal(), h=window(1, 1) | sinks(1), extra=2)",
        "Grid(t=3, h=4, w=5).axial('t', 'w').T & causal()",
    ],
)
def test_texts(text):
    assert repr(sa.parse(text)) == text


def test_keeps_expressions_small():
    """Clamps that cannot act, windows of a whole axis and axes of size 1 are gone."""

    def spelt(spec):
        return repr(sa.where(lambda q, k: True).__class__(spec.node))

    grid = sa.Grid(t=1, h=8, w=8)
    blocks = grid.neighborhood((1, 8, 4), (1, 1, 4), causal=(True, False, False))
    assert spelt(blocks) == ("where(lambda q, k: (q % 8) // 4 == (k % 8) // 4)")
    assert "%" not in spelt(sa.Grid(x=9).neighborhood(3))
    assert "minimum" not in spelt(sa.Grid(x=9).neighborhood(3, 3))
    assert "maximum" not in spelt(sa.Grid(x=9).neighborhood(3, 2, causal=True))
    assert "% 1" not in spelt(grid.axial("w"))
    assert spelt(sa.Grid(h=4, w=4).axial("w")) == "where(lambda q, k: q // 4 == k // 4)"
    assert spelt(GRID.axial("t")) == "where(lambda q, k: (q - k) % 20 == 0)"


RUN = [
    (sa.Grid(h=6, w=10).neighborhood((3, 4), (1, 2)), 60),
    (sa.Grid(t=3, h=4, w=5).neighborhood((2, 3, 3), causal=(True, False, False)), 60),
    (sa.Grid(h=5, w=12).neighborhood(2, dilation=(2, 3)), 60),
    (sa.Grid(h=5, w=11).neighborhood((3, 3), extra=5), 60),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("spec", "n"), RUN, ids=lambda x: repr(x)[:70])
def test_attention(spec, n):
    """Values and gradients against float64."""
    grid = spec.grid
    rule = (spec.window, spec.stride, spec.dilation, spec.causal, spec.extra)
    pairs = neighborhood(grid.shape, *rule)
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.normal(size=(1, n, 2, 8)), jnp.float32) for _ in range(4)
    )
    config = sa.KernelConfig(block_q=32, block_kv=32)

    @jax.jit
    def call(q, k, v, do):
        attend = lambda *x: sa.attention(*x, spec, impl="xla", config=config)
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    heads = lambda x: np.swapaxes(np.asarray(x), 1, 2)
    expected = oracle.with_gradients(
        heads(q), heads(k), heads(v), pairs[None, None], 8**-0.5, do=heads(do)
    )
    found = [heads(x) for x in call(q, k, v, do)]
    wanted = (expected.o, expected.dq, expected.dk, expected.dv)
    for a, b in zip(found, wanted, strict=True):
        oracle.assert_close(a, b, "float32", repr(spec))


def test_queries_may_be_a_part():
    """As in decoding: the last rows alone."""
    spec = GRID.neighborhood(3, causal=(True, True, True))
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 60, 1, 8)), jnp.float32) for _ in "qkv")
    whole = sa.attention(q, k, v, spec, impl="xla")
    last = sa.attention(q[:, 50:], k, v, spec, impl="xla", q_offset=50)
    np.testing.assert_allclose(last, whole[:, 50:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.Grid(), "Grid of 0 axes: name 1 to 4"),
        (lambda: sa.Grid(a=1, b=1, c=1, d=1, e=1), "Grid of 5 axes: name 1 to 4"),
        (lambda: sa.Grid(h=0, w=3), "Grid: h=0 must be at least 1"),
        (lambda: sa.Grid(extra=3), "an identifier other than 'extra'.*rename it"),
        (lambda: sa.Grid(**{"a b": 3}), "axis 'a b' must be an identifier"),
        (lambda: GRID.product(x=sa.full()), "product: 'x' is not an axis .*: name one"),
        (lambda: GRID.axial("x"), "axial: 'x' is not an axis of .*name one of t, h, w"),
        (lambda: GRID.axial(), "needs at least one of the axes t, h, w"),
        (lambda: GRID.axial("w", extra=-1), "axial: extra=-1 must be at least 0"),
        (lambda: GRID.neighborhood((4, 4, 4)),
         "window 4 times dilation 1 on axis t must fit its 3 cells: .* at most 3"),
        (lambda: GRID.neighborhood((1, 1, 3), dilation=(1, 1, 2)),
         "window 3 times dilation 2 on axis w must fit its 5 cells: .* at most 2"),
        (lambda: GRID.neighborhood(1, dilation=(4, 1, 1)), "give less dilation"),
        (lambda: GRID.neighborhood(3, (1, 4, 1)),
         "stride 4 on axis h must be at most its window 3"),
        (lambda: GRID.neighborhood((3, 3)),
         r"window=\(3, 3\) has 2 entries, but the grid has 3 axes \(t, h, w\)"),
        (lambda: GRID.neighborhood(3, causal=(True,)), "causal=.* has 1 entries"),
        (lambda: GRID.neighborhood((3, 0, 3)), "window of axis h=0 must be at least 1"),
        (lambda: GRID.neighborhood(3, 0), "stride of axis t=0 must be at least 1"),
        (lambda: GRID.neighborhood(3, dilation=0), "dilation of axis t=0 must be at"),
        (lambda: sa.parse("Grid(t=3)"), r"spells Grid\(t=3\), not an index map"),
        (lambda: sa.parse("causal().product(t=full())"), "has no attribute 'product'"),
    ],
)  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.Grid(h=2.5), "h=2.5 must be an integer"),
        (lambda: GRID.product(t=3), "product: t=3 must be an index map"),
        (lambda: GRID.neighborhood(2.5), "window of axis t=2.5 must be an integer"),
        (lambda: GRID.neighborhood(3, causal=1), "causal of axis t=1 must be True or"),
    ],
)
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


LENGTHS = [
    GRID.neighborhood(3), GRID.neighborhood((3, 4, 5)), GRID.product(t=sa.causal()),
    GRID.product(), GRID.axial("h"), GRID.axial("t", "h", "w"),
]  # fmt: skip


@pytest.mark.parametrize("spec", LENGTHS, ids=repr)
def test_the_sequence_must_be_the_grid(spec):
    message = "a grid .* has 60 positions, but .* runs up to"
    for q_len, kv_len in ((61, 61), (60, 59), (60, 61), (61, 60)):
        with pytest.raises(ValueError, match=message):
            spec.dense(q_len, kv_len)
        with pytest.raises(ValueError, match=message):
            sa.plan(spec, q_len, kv_len)
    with pytest.raises(ValueError, match=message):
        spec.T.dense(61)
    assert spec.dense(7, 60).shape == (1, 7, 60)
