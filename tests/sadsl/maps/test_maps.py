"""Maps equal their definitions, obey their algebra, and refuse bad arguments."""

import pickle
import re

import jax
import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa

Q, K = np.arange(23)[:, None], np.arange(19)[None, :]

DEFINITIONS = [
    (sa.full(), (Q >= 0) & (K >= 0)),
    (sa.causal(), K <= Q),
    (sa.window(4), (Q - 4 <= K) & (K <= Q)),
    (sa.window(4, 2), (Q - 4 <= K) & (K <= Q + 2)),
    (sa.sinks(3), (K < 3) & (Q >= 0)),
    (sa.prefix(3), (K < 3) & (Q >= 0)),
    (sa.keys(2, 7), (K >= 2) & (K < 7) & (Q >= 0)),
    (sa.queries(2, 7), (Q >= 2) & (Q < 7) & (K >= 0)),
    (sa.strided(5), (Q - K) % 5 == 0),
    (sa.dilated(2, 1, 3), ((Q - K) % 3 == 0) & (Q - K <= 6) & (K - Q <= 3)),
    (sa.blocks(4), Q // 4 == K // 4),
    (sa.offsets({0, 3, -2}), np.isin(Q - K, [0, 3, -2])),
    (sa.where(lambda q, k: (q * 2 + k) % 3 == 1), (Q * 2 + K) % 3 == 1),
    (sa.where(lambda q, k: 1 - q < -k), 1 - Q < -K),
    (sa.where(lambda q, k: abs(q - k) != 2), np.abs(Q - K) != 2),
    (sa.where(lambda q, k: sa.table((5, 0, 9))[q % 3] > k),
     np.array([5, 0, 9])[Q % 3] > K),
    (sa.where(lambda q, k: sa.maximum(q, 5) >= sa.minimum(k, 9)),
     np.maximum(Q, 5) >= np.minimum(K, 9)),
    (sa.where(lambda q, k: sa.isin(q + k, range(4)) | ((q + k).isin({9}))),
     np.isin(Q + K, [0, 1, 2, 3, 9])),
    (sa.where(lambda q, k: True), (Q >= 0) & (K >= 0)),
    (sa.causal() & sa.window(4), (K <= Q) & (Q - 4 <= K)),
    (sa.causal() | sa.sinks(8), (K <= Q) | (K < 8)),
    (sa.causal() - sa.sinks(2), (K <= Q) & (K >= 2)),
    (~sa.causal(), K > Q),
    (sa.window(4, 1).T, (K - 4 <= Q) & (Q <= K + 1)),
    (sa.causal().lift(4), K // 4 <= Q // 4),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), DEFINITIONS, ids=lambda x: repr(x)[:50])
def test_definitions(spec, expected):
    np.testing.assert_array_equal(spec.dense(23, 19)[0], expected)


PICTURE = re.compile(r">>> print\((sa\..+)\.picture\(([\d, ]+)\)\)\n((?: *[#.]+\n)+)")


@pytest.mark.parametrize(
    "make", [sa.full, sa.causal, sa.window, sa.sinks, sa.keys, sa.queries, sa.strided,
             sa.dilated, sa.blocks, sa.offsets],
)  # fmt: skip
def test_pictures_in_docstrings(make):
    """Every dot counts here; to a doctest, three of them stand for any text."""
    ((text, sizes, drawn),) = PICTURE.findall(make.__doc__)
    spec = sa.parse(text.replace("sa.", ""))
    assert spec.picture(*map(int, sizes.split(","))) == "\n".join(drawn.split())


def test_permute():
    order = np.random.default_rng(0).permutation(23)
    expected = order[K] <= order[Q]
    np.testing.assert_array_equal(sa.causal().permute(order).dense(23, 19)[0], expected)


def test_heads():
    spec = sa.per_head(sa.causal(), sa.window(1)) & sa.where(lambda q, k, h: k >= h)
    dense = spec.dense(9, num_heads=4)
    q, k = np.arange(9)[:, None], np.arange(9)[None, :]
    for h in range(4):
        near = (k <= q) if h < 2 else (k <= q) & (q - k <= 1)
        np.testing.assert_array_equal(dense[h], near & (k >= h))


def test_operands():
    spec = sa.where(lambda q, k: (k <= q) | (k < sa.operand("prefix")))
    dense = spec.dense(6, operands={"prefix": np.array(4)})[0]
    q, k = np.arange(6)[:, None], np.arange(6)[None, :]
    np.testing.assert_array_equal(dense, (k <= q) | (k < 4))
    ids = {"q_segment_ids": np.array([0, 0, 1]), "kv_segment_ids": np.array([1, 0, 0])}
    expected = [[0, 1, 1], [0, 1, 1], [1, 0, 0]]
    np.testing.assert_array_equal(sa.segments().dense(3, operands=ids)[0], expected)
    with pytest.raises(ValueError, match=r"reads the run-time array 'q_segment_ids'"):
        sa.segments().dense(3)


def test_maps_are_values():
    a, b = sa.causal() & sa.window(3), sa.causal() & sa.window(3)
    assert a == b
    assert hash(a) == hash(b)
    assert a != sa.causal() & sa.window(4)
    assert a != sa.window(3) & sa.causal()
    assert sa.prefix(4) == sa.sinks(4)
    assert sa.where(lambda q, k: k <= q) == sa.where(lambda q, k: q >= k)
    assert pickle.loads(pickle.dumps(a)) == a
    total = jax.jit(lambda m, x: x + m.dense(3).sum(), static_argnums=0)
    assert total(a, 1) == 7
    with pytest.raises(AttributeError):
        sa.window(3).left = 4


def test_users_write_their_own():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Diagonal(sa.IndexMap):
        width: int

        def pairs(self, q, k, h):
            return abs(q - k) < self.width

    spec = sa.causal() & Diagonal(2)
    q, k = np.arange(5)[:, None], np.arange(5)[None, :]
    np.testing.assert_array_equal(spec.dense(5)[0], (k <= q) & (q - k < 2))
    assert spec == sa.causal() & Diagonal(2)
    assert sa.plan(spec, 100).num_pairs == 199


@settings(max_examples=few(300), suppress_health_check=list(HealthCheck))
@given(strategies.with_heads())
def test_text_reads_back(spec):
    assert sa.parse(repr(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "causal() & (window(512) | sinks(4))",
        "causal() - sinks(2) - keys(4, 9)",
        "~(causal() | window(2, right=3))",
        "(causal() & window(3)).T.lift(8)",
        "causal().permute([1, 0, 2])",
        "per_head(causal(), strided(3), offsets({-1, 0, 4}))",
        "where(lambda q, k, h: (q - k) * 2 % 7 <= h)",
        "where(lambda q, k: table((3, 1))[q % 2] == operand('x')[k])",
        "where(lambda q, k: k < operand('n'))",
        "segments() & blocks(size=4)",
        "softmax(causal(), logits_soft_cap=30.0)",
    ],
)
def test_texts(text):
    spec = sa.parse(text)
    assert sa.parse(repr(spec)) == spec
    assert sa.parse(f"  {text}\n") == spec


def test_softmax_takes_a_soft_cap():
    assert sa.parse("softmax(causal(), 30)") == sa.softmax(sa.causal(), 30.0)
    with pytest.raises(ValueError, match=r"logits_soft_cap=-1.0 must be positive"):
        sa.softmax(sa.causal(), -1)
    with pytest.raises(TypeError, match="softmax takes an index map"):
        sa.softmax(3)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("causal() & windw(3)", 11, "unknown name 'windw'"),
        ("causal() and window(3)", 0, "uses `and` or `or`"),
        ("not causal()", 0, "uses `not`"),
        ("causal() & window(-1)", 11, "left=-1 must be at least 0"),
        ("causal() &", 10, "is not an expression"),
        ("", 0, "is empty"),
        ("3", 0, "spells 3, not an index map"),
        ("__import__('os').system('true')", 0, "not in the grammar"),
        ("where(lambda q, k: q.__class__)", 19, "not in the grammar"),
        ("where(lambda a, b: a < b)", 6, "needs `lambda q, k:`"),
        ("where(lambda q, k: 0 < q < k)", 19, "chains comparisons"),
        ("where(lambda q, k: q * k == 0)", 19, "takes a constant on one side"),
        ("window(3.5)", 0, "left=3.5 must be an integer"),
        ("window(*[1, 2])", 7, "not in the grammar"),
        ("window(**3)", 0, "uses `**`"),
        ("[m for m in x]", 0, "not in the grammar"),
        ("causal() + window(2)", 0, "is refused"),
        ("causal()\n | widow(3)", 12, "unknown name 'widow'"),
        ("'é' + widow(3)", 6, "unknown name 'widow'"),
    ],
)
def test_bad_texts_point_at_the_place(text, position, message):
    with pytest.raises(ValueError, match=f"at position {position}, the spec") as error:
        sa.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.window(-1), "window: left=-1 must be at least 0"),
        (lambda: sa.window(3, -2), "window: right=-2 must be at least 0"),
        (lambda: sa.blocks(0), "blocks: size=0 must be at least 1"),
        (lambda: sa.strided(0), "strided: stride=0 must be at least 1"),
        (lambda: sa.dilated(1, 1, 0), "dilated: dilation=0 must be at least 1"),
        (lambda: sa.sinks(-3), "sinks: n=-3 must be at least 0"),
        (lambda: sa.keys(5, 3), "keys: stop=3 must be at least 5"),
        (lambda: sa.queries(-1, 3), "queries: start=-1 must be at least 0"),
        (lambda: sa.causal().lift(0), "lift: block=0 must be at least 1"),
        (lambda: sa.causal().permute([0, 0]), "exactly once"),
        (lambda: sa.causal().permute(range(1, 30)), "with 29 entries must hold each"),
        (lambda: sa.per_head(), "give at least one map"),
        (lambda: sa.table(()), "at least one value"),
        (lambda: sa.operand("no name"), "name of an operand, a Python identifier"),
        (lambda: sa.where(lambda q, k: q % 0 == 0), "divisor must be positive"),
        (lambda: sa.where(lambda q, k: q // -2 == 0), "divisor must be positive"),
        (
            lambda: sa.per_head(*[sa.causal()] * 3).dense(4, num_heads=4),
            "do not divide 4",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.causal() and sa.full(), "write `a & b`"),
        (lambda: sa.causal() or sa.full(), "write `a & b`"),
        (lambda: 1 if sa.causal() else 2, "write `a & b`"),
        (lambda: sa.causal() & 3, "unsupported operand"),
        (lambda: sa.window(True), "must be an integer"),
        (lambda: sa.offsets({1.5}), "offsets: 1.5 must be an integer"),
        (lambda: sa.where(lambda q, k: k if q < k else q), "cannot branch on"),
        (lambda: sa.where(lambda q, k: 0 <= k <= q), "cannot branch on"),
        (lambda: sa.where(lambda q, k: min(q, k) == q), "cannot branch on"),
        (lambda: sa.where(lambda q, k: (q - k) in {1, 2}), "isin"),
        (lambda: sa.where(lambda q, k: q * k == 0), "takes a constant on one side"),
        (lambda: sa.where(lambda q, k: q // k == 0), "takes a constant on one side"),
        (lambda: sa.where(lambda q, k: q / 2 == 0), "cannot trace this operation"),
        (lambda: sa.where(lambda q, k: q**2 == k), "cannot trace this operation"),
        (lambda: sa.where(lambda q, k: np.sin(q) == k), "Symbol"),
        (
            lambda: sa.where(lambda q, k: range(10)[q] == k),
            "cannot trace this operation",
        ),
        (
            lambda: sa.where(lambda q, k: q * 1.5 == k),
            "on `q \\* 1.5`: a traced map takes integers",
        ),
        (lambda: sa.where(lambda q, k: q), "expected a comparison"),
        (lambda: sa.where(lambda q: q < 1), "not of 1 arguments"),
        (
            lambda: sa.where(lambda q, k: sa.operand("x")[3] == k),
            "must be made of q, k and h",
        ),
        (lambda: sa.per_head(sa.causal(), 3), "per_head takes index maps"),
    ],
)
def test_what_cannot_be_traced(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@given(st.integers(1, 30), st.integers(0, 10))
def test_a_function_is_traced_once(n, width):
    calls = []

    def near(q, k):
        calls.append(1)
        return abs(q - k) <= width

    spec = sa.where(near)
    spec.dense(n)
    sa.plan(spec, n)
    assert calls == [1]


def test_where_reads_heads_and_lengths_and_keeps_defaults():
    last = sa.where(lambda q, k, h, n: (q >= n - 2) & (k % (2 + 1) == h))
    assert repr(last).startswith("where(lambda q, k, h, n: ")
    assert sa.parse(repr(last)) == last
    q, k = np.arange(9)[:, None], np.arange(9)[None]
    np.testing.assert_array_equal(
        last.dense(9, num_heads=2)[1], (q >= 7) & (k % 3 == 1)
    )
    for d in (1, 4):
        found = sa.where(lambda q, k, d=d: q - k == d)
        assert repr(found) == f"where(lambda q, k: q - k == {d})"
    with pytest.raises(TypeError, match="not of 1 arguments"):
        sa.where(lambda q: q == 0)
