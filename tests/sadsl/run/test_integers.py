"""Integers near the limits of int32 and beyond, on every backend."""

import calls
import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import ir
from lowering.expr import heads
from sadsl import floor_log2, isin, operand, table, where
from sadsl.run.checks import segment_ids

N = 20
LOW, HIGH = -(2**31), 2**31 - 1
a, b = (operand(name) for name in "ab")

# One map a head: run-time integers, then constants.
MAPS = {
    "arrays": (
        where(lambda q, k: k >= operand("start")[q]),
        where(lambda q, k: b[k] < a[q]),
        where(lambda q, k: floor_log2(abs(a[q] - b[k])) == 31),
        where(lambda q, k: (a[q] - b[k]) % 7 < 3),
        where(lambda q, k: a[q] * 2**26 + k > 2 * b[k]),
        where(lambda q, k: (k - 2 < operand("bare")) | (q == k)),
    ),
    "constants": (
        where(lambda q, k: (q * 2**26 + k * 3) % 5 < 2),
        sa.window(2**31, 2**70),
        where(lambda q, k: (q - k <= 2**40) & (k < 10**12)),
        where(lambda q, k: isin(q - k, {-(2**50), 1, 5, 2**31, 2**40})),
        where(lambda q, k: table((2**40, 5, -(2**33)))[q % 3] > k),
        where(lambda q, k: (q * 2**31 + k) // 3 % 4 == 1),
    ),
}


def integers():
    rng = np.random.default_rng(3)
    values = {name: rng.integers(LOW, HIGH, N, endpoint=True) for name in "ab"}
    values["a"][:5] = [-5, LOW, HIGH, 0, LOW + 1]
    values["b"][:5] = [HIGH, LOW, 0, HIGH - 1, 3]
    start = rng.integers(0, N, N)
    start[::3] = LOW
    values |= {"start": start, "bare": LOW + 1}
    return {name: np.asarray(x, np.int32) for name, x in values.items()}


def pairs_of(spec, values):
    nodes = heads.per_head(spec.node, len(spec.maps))
    return np.stack(
        [exact.pairs(node, N, N, values, h) for h, node in enumerate(nodes)]
    )


@pytest.mark.sample(1)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("which", MAPS)
@pytest.mark.parametrize("impl", calls.IMPLS)
def test_no_backend_wraps_around(impl, which):
    spec, values = sa.per_head(*MAPS[which]), integers()
    values = {name: values[name] for name in ir.operand_names(spec.node)}
    pairs = pairs_of(spec, values)
    assert pairs.any(axis=(1, 2)).all()
    q, k, v, do = calls.arrays(1, N, N, len(spec.maps), 1)
    calls.assert_matches(impl, spec, pairs[None], q, k, v, do, operands=values)


def test_a_window_longer_than_the_sequence_is_as_long():
    found, expected = (sa.plan(sa.window(n), 300) for n in (2**70, 299))
    assert (found.num_pairs, found.num_full) == (300 * 301 // 2, expected.num_full)
    assert str(found) == str(expected)
    bounds = where(lambda q, k: (k <= q) & (q - k > -(2**70)) & (k != 2**64))
    assert sa.plan(bounds, 300).num_pairs == found.num_pairs


def test_a_plan_counts_what_64_bits_hold():
    a_map = where(lambda q, k: q * 2**40 <= k * 2**39 + 2**41)
    expected = exact.pairs(a_map.node, N, N, {}).sum()
    assert sa.plan(a_map, N, block_q=4, block_kv=8).num_pairs == expected
    assert a_map.dense(N).sum() == expected


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_what_64_bits_may_not_hold_is_refused_by_name(impl):
    spec = where(lambda q, k: operand("s")[q] * 2**40 <= k)
    q, k, v, _ = calls.arrays(1, N, N)
    given = {"s": np.zeros(N, np.int32)}
    with pytest.raises(ValueError, match=r"operand\('s'\)\[q\] \* 109951.* clip"):
        sa.attention(q, k, v, spec, operands=given, impl=impl)


@pytest.mark.slow
def test_what_is_eligible_may_be_beyond_32_bits():
    q, k, v, _ = calls.arrays(1, N, N)
    options = {"impl": "xla", "operands": {}}
    far = "topk(2, block=4, block_q=4, eligible=causal() & window(1099511627776))"
    near = "topk(2, block=4, block_q=4, eligible=causal() & window(19))"
    found, expected = (sa.attention(q, k, v, x, **options) for x in (far, near))
    np.testing.assert_array_equal(found, expected)


# --- biases ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("impl", calls.IMPLS)
def test_a_bias_adds_the_difference_of_any_two_integers(impl):
    spec = sa.softmax(
        sa.full(),
        bias=sa.bias(lambda q, k: (a[q] - b[k]) * 1e-9 + ((q - k) * 2**30) * 1e-10),
    )
    values = {name: integers()[name] for name in "ab"}
    q, k, v, _ = calls.arrays(1, N, N, 1, 1)
    options = calls.BACKENDS[impl] | {"impl": impl, "operands": values}
    out = sa.attention(q, k, v, spec, **options)
    s = np.einsum("qd,kd->qk", *(np.asarray(x[0, :, 0], float) for x in (q, k))) / 4
    left, right = (x.astype(float) for x in values.values())
    at = np.arange(N)
    s += (left[:, None] - right) * 1e-9 + (at[:, None] - at) * 2.0**30 * 1e-10
    p = np.exp(s - s.max(axis=1, keepdims=True))
    expected = p / p.sum(axis=1, keepdims=True) @ np.asarray(v[0, :, 0], float)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=2e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_an_index_beyond_32_bits_is_the_end_of_the_array(impl):
    spec = sa.softmax(sa.full(), bias=sa.bias(lambda q, k: sa.weights("w")[a[q] + 5]))
    values = {"a": np.array([HIGH] * N, np.int32), "w": jnp.arange(8.0)}
    q, k, v, _ = calls.arrays(1, N, N, 1, 1)
    run = lambda operands: sa.attention(
        q, k, v, spec, operands=operands, impl=impl, return_lse=True
    )
    last = run(values | {"a": np.array([2] * N, np.int32)})
    for found, expected in zip(run(values), last, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- the border ---


def with_ids(ids, spec="causal() & segments()", **options):
    q, k, v, _ = calls.arrays(1, N, N)
    return sa.attention(
        q, k, v, spec, q_segment_ids=ids, kv_segment_ids=ids, impl="xla", **options
    )


LINEAR = "linear('elu1', map=causal() & segments())"
DOCUMENTS = np.arange(N)[None] // 6


@pytest.mark.sample(3)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("spec", ["causal() & segments()", LINEAR])
@pytest.mark.parametrize(
    "ids",
    [DOCUMENTS * 2**32 + 5, np.array([2**64 - 1, 0, 2**63, 7], np.uint64)[DOCUMENTS]],
    ids=["int64", "uint64"],
)
def test_ids_beyond_32_bits_are_told_apart(spec, ids):
    np.testing.assert_array_equal(with_ids(ids, spec), with_ids(DOCUMENTS, spec))


def test_ids_of_queries_and_keys_are_ranked_together():
    q_ids, kv_ids = np.array([[2**40, 3]]), np.array([[3, 2**33, 2**40]])
    q_rank, kv_rank = segment_ids(q_ids, kv_ids)
    np.testing.assert_array_equal(q_rank, [[2, 0]])
    np.testing.assert_array_equal(kv_rank, [[0, 1, 2]])


SPEC = where(lambda q, k: k <= operand("x")[q])


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([2**31] * N, np.uint32), 2**31),
        (np.array([-(2**40)] * N), -(2**40)),
        ([2**40] * N, 2**40),
    ],
)
def test_operands_that_int32_does_not_hold_are_refused(values, shown):
    q, k, v, _ = calls.arrays(1, N, N)
    with pytest.raises(ValueError, match=f"'x' holds {shown}: run-time integers"):
        sa.attention(q, k, v, SPEC, operands={"x": values}, impl="xla")
    with pytest.raises(ValueError, match=f"'x' holds {shown}: run-time integers"):
        SPEC.dense(N, operands={"x": values})


@pytest.mark.usefixtures("quick")
def test_wide_dtypes_with_small_integers_are_int32():
    q, k, v, _ = calls.arrays(1, N, N)
    outs = [
        sa.attention(q, k, v, SPEC, operands={"x": np.arange(N, dtype=d)}, impl="xla")
        for d in (np.int32, np.uint32, np.int64, np.uint8)
    ]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_traced_integers_that_may_be_wide_are_refused():
    q, k, v, _ = calls.arrays(1, N, N)
    with jax.enable_x64(True):
        ids = jnp.asarray(DOCUMENTS, jnp.int64)
        with pytest.raises(ValueError, match="traced as int64, and int32 may not hold"):
            jax.jit(with_ids)(ids)
    unsigned = jnp.zeros(N, jnp.uint32)
    call = lambda x: sa.attention(q, k, v, SPEC, operands={"x": x}, impl="xla")
    with pytest.raises(ValueError, match="traced as uint32, and int32 may not hold"):
        jax.jit(call)(unsigned)
