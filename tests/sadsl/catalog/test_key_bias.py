"""Keys with scores of their own: dynamic masks and the bias that is added."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from content_cases import drawn

import sadsl as sa
from sadsl import catalog
from sadsl.run.call import select
from sadsl.selections import key_positive, key_topw
from sadsl.selections.key_topw import descending_ranks, least_of_prefixes


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    """Compiled as for the interpreter: here compilation takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)


# --- ranks ---


@pytest.mark.parametrize(("n", "w"), [(1, 1), (13, 1), (257, 40)])
def test_least_of_prefixes(n, w):
    rng = np.random.default_rng(n)
    values = np.stack([rng.permutation(n) for _ in range(3)]).astype(np.int32)
    lengths = rng.integers(1, n + 1, size=n + 2).astype(np.int32)
    wanted = [[sorted(row[:m])[:w][-1] for m in lengths] for row in values.tolist()]
    find = jax.jit(least_of_prefixes, static_argnums=2)
    found = find(values, lengths, w)
    np.testing.assert_array_equal(found, wanted)


def test_ranks_of_ties_and_of_what_is_no_number():
    scores = np.array([2.0, np.nan, 3.0, 2.0, np.inf, 3.0, -np.inf], np.float32)
    assert np.asarray(descending_ranks(scores)).tolist() == [2, 4, 0, 3, 5, 1, 6]


# --- the maps against loops ---


def best(scores, w):
    """The indices of the ``w`` highest finite scores, lower indices first."""
    order = sorted(np.flatnonzero(np.isfinite(scores)), key=lambda j: (-scores[j], j))
    return order[:w]


def smooth(row, size):
    if size is None:
        return row
    new = row.copy()
    for start in range(0, len(row), size):
        block = row[start : start + size]
        new[start : start + size] = 2 * block.sum() > len(block)
    return new


def expected(spec, bias, n, offset):
    """Bool ``[heads, n, keys]`` for ``bias`` of ``[heads, keys]``."""
    found = np.zeros((len(bias), n, bias.shape[1]), bool)
    for h, scores in enumerate(bias):
        for i in range(n):
            row = np.zeros(bias.shape[1], bool)
            past = np.arange(bias.shape[1]) <= i + offset
            if not hasattr(spec, "w"):
                row = (scores > 0) & np.isfinite(scores)
            elif spec.shared:
                row[best(scores, spec.w)] = True
            else:
                row[best(np.where(past, scores, -np.inf), spec.w)] = True
            row = smooth(row, spec.smooth)
            found[h, i] = row & past if getattr(spec, "shared", True) is False else row
    return found


@partial(jax.jit, static_argnums=(0,))
def parts_of(spec, q, k, operands):
    return select(spec, q, k, operands=operands)


def seen(spec, q, k, operands, offset=0):
    """Every pair, read off the weights: queries of 0 share theirs out evenly."""
    keys = k.shape[1]
    v = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (1, keys, k.shape[2], keys))

    @jax.jit
    def weights(q, k, v, operands):
        return sa.attention(
            0 * q, k, v, spec, operands=operands, q_offset=offset, impl="reference"
        )

    return np.swapaxes(weights(q, k, v, operands) > 0, 1, 2)[0]


SPECS = [
    key_topw(5), key_topw(300), key_topw(5, smooth=4), key_topw(5, shared=True),
    key_topw(9, shared=True, smooth=4), key_positive(), key_positive(smooth=8),
]  # fmt: skip


@pytest.mark.sample(5)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_is_what_loops_find(spec):
    n = 33
    q, k = drawn(1, n, 4, 4), drawn(1, n, 2, 4)
    # Whole numbers have ties; one head has few that are finite.
    bias = np.round(2 * drawn(1, 2, n, seed=n))
    bias[0, 0, 3::5], bias[0, 1, 1:-3] = np.nan, -np.inf
    parts = parts_of(spec, q, k, {"bias": bias})
    given = {name: np.asarray(x)[0] for name, x in parts.items()}
    found = spec.dense(n, num_heads=4, operands=given)
    wanted = expected(spec, np.repeat(bias[0], 2, axis=0), n, 0)
    np.testing.assert_array_equal(found, wanted)
    assert sa.parse(repr(sa.causal() & spec)) == sa.causal() & spec


@pytest.mark.sample(1)
@pytest.mark.parametrize("spec", [key_topw(5), key_topw(5, smooth=4)], ids=repr)
def test_queries_that_come_late(spec):
    q, k, bias = drawn(1, 13, 2, 4), drawn(1, 33, 1, 4), drawn(1, 1, 33, seed=2)
    wanted = expected(spec, np.repeat(bias[0], 2, axis=0), 13, 20)
    np.testing.assert_array_equal(seen(spec, q, k, {"bias": bias}, 20), wanted)


def test_a_prefix_longer_than_a_step_of_blocks():
    """Queries are smoothed some at a time: more of them than that."""
    spec, n = key_topw(20, smooth=8), 130
    q, bias = drawn(1, n, 1, 4), drawn(1, 1, n, seed=1)
    ((name, kept),) = parts_of(spec, q, q, {"bias": bias}).items()
    found = spec.dense(n, operands={name: np.asarray(kept)[0]})
    np.testing.assert_array_equal(found, expected(spec, bias[0], n, 0))


# --- the bias ---


def by_head(x):
    return np.swapaxes(np.asarray(x, np.float64), 1, 2)


def dense(q, k, v, bias, pairs, scale):
    """``[batch, heads, seq, dim]``, the bias ``[batch, heads, keys]``."""
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * scale + bias[:, :, None]
    s = jnp.where(pairs, s, -100.0)
    # Its gradient would be 0 / 0 where a fused s is not quite the greatest any more.
    top = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))
    p = jnp.where(pairs, jnp.exp(s - top), 0.0)
    total = p.sum(axis=-1, keepdims=True)
    return jnp.einsum("bhqk,bhkd->bhqd", p / jnp.where(total > 0, total, 1.0), v)


def with_gradients(attend, arrays, do):
    @jax.jit
    def call(arrays, do):
        o, pull = jax.vjp(attend, *arrays)
        return o, *pull(do)

    return [np.asarray(x) for x in call(arrays, do)]


def check_bias(spec, arrays, bias, pairs, impl):
    """Values and all gradients of a map with ``key_bias``, against float64."""
    q, k, v, do = arrays
    dtype = q.dtype
    group = q.shape[2] // k.shape[2]
    term = sa.softmax(spec, bias=sa.key_bias("bias"))

    @jax.jit
    def call(q, k, v, bias, do):
        attend = lambda q, k, v, bias: sa.attention(
            q, k, v, term, operands={"bias": bias}, impl=impl,
            interpret=impl in ("tpu", "triton"),
            config=sa.KernelConfig(block_q=16, block_kv=16),
        )  # fmt: skip
        o, pull = jax.vjp(attend, q, k, v, bias)
        return o, *pull(do)

    found = [np.asarray(x, np.float64) for x in call(q, k, v, bias, do)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(by_head(x)) for x in (q, k, v)]
        wide.append(jnp.asarray(np.asarray(bias), jnp.float64))

        def attend(q, *others):
            k, v, bias = (jnp.repeat(x, group, axis=1) for x in others)
            return dense(q, k, v, bias, jnp.asarray(pairs), q.shape[-1] ** -0.5)

        wanted = with_gradients(attend, wide, jnp.asarray(by_head(do)))
    for a, b in zip(found, wanted, strict=True):
        a = a if a.ndim == 3 else np.swapaxes(a, 1, 2)
        oracle.assert_close(a, b, dtype, repr(spec))


def some(n, head_dim, dtype="float32"):
    shapes = [(1, n, 2, head_dim), *[(1, n, 1, head_dim)] * 2, (1, n, 2, head_dim)]
    return [jnp.asarray(drawn(*x, seed=i), dtype) for i, x in enumerate(shapes)]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "tpu", "triton"])
def test_bias_is_added(impl):
    """Where the keys are chosen by it, and with an odd head_dim."""
    n, spec = 23, catalog.dynamic_mask(7)
    bias = 2 * jnp.asarray(drawn(1, 1, n, seed=7))
    pairs = expected(key_topw(7), np.asarray(bias[0]), n, 0)
    check_bias(spec, some(n, 5), bias, pairs[None], impl)


def test_bias_in_bfloat16():
    n = 13
    pairs = np.tril(np.ones((1, 1, n, n), bool))
    bias = jnp.asarray(drawn(1, 1, n, seed=4))
    check_bias(sa.causal(), some(n, 4, "bfloat16"), bias, pairs, "reference")


# --- dynamic mask attention ---


def bias_of(v, weight, gain):
    """Of one key head, ``[batch, 1, keys]``."""
    return (jnp.log1p(jnp.exp(v[:, :, 0] @ weight)) * gain[None]).swapaxes(1, 2)


def test_dynamic_mask_attention():
    """The weights are trained by the bias of the keys that are seen, and only so."""
    n, w = 19, 6
    q, k, v, do = some(n, 4)
    arrays = q, k, v, jnp.asarray(drawn(4, 1, seed=5)), jnp.asarray([[0.7]])

    def attend(q, k, v, weight, gain):
        return catalog.dynamic_mask_attention(
            q, k, v, (weight, gain[0]), catalog.dynamic_mask(w), impl="reference"
        )

    found = with_gradients(attend, arrays, do)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        pairs = expected(key_topw(w), np.asarray(bias_of(*wide[2:]))[0], n, 0)

        def dense_attend(q, k, v, *weights):
            heads = (
                jnp.swapaxes(jnp.repeat(x, 2 // x.shape[2], 2), 1, 2) for x in (q, k, v)
            )
            bias = jnp.repeat(bias_of(v, *weights), 2, axis=1)
            return jnp.swapaxes(dense(*heads, bias, pairs[None], 0.5), 1, 2)

        wanted = with_gradients(
            dense_attend, wide, jnp.asarray(np.asarray(do), jnp.float64)
        )
    for a, b in zip(found, wanted, strict=True):
        oracle.assert_close(a, b, "float32")


def test_forms_of_the_bias():
    v, weight, gain = drawn(1, 13, 2, 4), drawn(8, 2, seed=1), drawn(2, seed=2)
    wide = v.reshape(13, 8).astype(np.float64)
    linear = (np.log1p(np.exp(wide @ weight)) * gain).T[None]
    for form, wanted in (("linear", linear), ("exp", np.exp(linear))):
        found = catalog.value_bias(v, weight, gain, form)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_as_many_keys_as_there_are_is_dense_with_a_bias():
    n = 13
    q, k, v, _ = some(n, 4)
    weights = jnp.asarray(drawn(4, 1, seed=5)), jnp.ones(1)
    biased = sa.softmax(sa.causal(), bias=sa.key_bias("bias"))

    @jax.jit
    def call(q, k, v, weights):
        attend = partial(catalog.dynamic_mask_attention, q, k, v, weights)
        bias = catalog.value_bias(v, *weights)
        return (
            sa.attention(q, k, v, biased, operands={"bias": bias}, impl="reference"),
            attend(impl="reference"),
            attend(catalog.dynamic_mask(n, shared=True), impl="reference"),
        )

    wanted, *found = call(q, k, v, weights)
    for each in found:
        oracle.assert_close(each, np.asarray(wanted, np.float64), "float32")


def test_shared_keys_leave_early_queries_without_any():
    bias = np.arange(13, dtype=np.float32)[None, None]
    pairs = seen(catalog.dynamic_mask(3, shared=True), *some(13, 4)[:2], {"bias": bias})
    assert pairs.sum(axis=2).tolist() == [[0] * 10 + [1, 2, 3]] * 2


# --- bad input ---

Q, K, V, _ = some(8, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: key_topw(0), "key_topw: w=0 must be at least 1"),
        (lambda: key_topw(4, smooth=0), "smooth=0 must be at least 1"),
        (lambda: key_positive(smooth=0), "smooth=0 must be at least 1"),
        (lambda: select(key_topw(2), Q, K), r"a score for every key, floats \[2, 8\]"),
        (lambda: select(key_topw(2), Q, K, operands={"bias": jnp.ones((3, 8))}),
         r"'bias' has shape \(3, 8\) .* 8 keys in each of 2 query heads"),
        (lambda: select(key_positive(), Q, K, operands={"bias": jnp.ones((2, 7))}),
         r"'bias' has shape \(2, 7\)"),
        (lambda: catalog.value_bias(V, jnp.ones((4, 2)), jnp.ones(1)),
         r"weight has shape \(4, 2\): for values of 1 heads .* \(4, 1\)"),
        (lambda: catalog.value_bias(V, jnp.ones((4, 1)), jnp.ones(2)),
         r"gain has shape \(2,\)"),
        (lambda: catalog.value_bias(V, jnp.ones((4, 1)), jnp.ones(1), "square"),
         "form='square' must be one of"),
    ],
)  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
