"""``dot_product_attention`` equals that of jax.nn in values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa

BATCH, QUERIES, KEYS, HEADS, GROUPS, DIM = 2, 7, 13, 4, 2, 8
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), "float32")


def some(*shape):
    mask = RNG.random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


MASKS = {
    "none": None,
    "all": some(BATCH, HEADS, QUERIES, KEYS),
    "padding": some(BATCH, 1, 1, KEYS),
}
BIASES = {
    "none": None,
    "all": normal(BATCH, HEADS, QUERIES, KEYS),
    "keys": normal(1, HEADS, 1, KEYS),
    "pairs": normal(1, 1, QUERIES, KEYS),
}
WINDOWS = {"none": None, "one": 3, "two": (2, 1)}
LENGTHS = {
    "none": {},
    "keys": {"key_value_seq_lengths": jnp.array([5, 13], jnp.int32)},
    "both": {
        "query_seq_lengths": jnp.array([3, 7], jnp.int32),
        "key_value_seq_lengths": jnp.array([9, 13], jnp.int32),
    },
}
TABLE = list(
    itertools.product(MASKS, BIASES, WINDOWS, LENGTHS, [False, True], [None, 0.3])
)
FEW = TABLE[185::149]


CASES = [
    pytest.param(
        *case,
        id="-".join(map(str, case)),
        marks=() if case in FEW else pytest.mark.slow,
    )
    for case in TABLE
]


def seen(mask, local_window_size, is_causal, scale, **lengths):
    """The pairs that attend, by definition."""
    del scale
    q, k = np.arange(QUERIES)[:, None], np.arange(KEYS)[None]
    found = np.ones((BATCH, HEADS, QUERIES, KEYS), bool)
    if mask is not None:
        found &= np.asarray(mask)
    if local_window_size is not None:
        size = local_window_size
        before, after = (size, size) if isinstance(size, int) else size
        found &= (q - before <= k) & (k <= q + after)
    if is_causal:
        found &= k <= q
    for name, at in (("query_seq_lengths", q), ("key_value_seq_lengths", k)):
        if name in lengths:
            found &= at < np.asarray(lengths[name])[:, None, None, None]
    return found


def empty_rows_are_empty(out, lse, rows):
    assert not np.any(np.asarray(out)[~rows])
    assert np.all((np.asarray(lse) == -np.inf) == ~np.asarray(rows))


@pytest.mark.parametrize(
    ("mask", "bias", "window", "lengths", "is_causal", "scale"), CASES
)
def test_equal_to_jax(mask, bias, window, lengths, is_causal, scale):
    q = normal(BATCH, QUERIES, HEADS, DIM)
    k, v = (normal(BATCH, KEYS, GROUPS, DIM) for _ in "kv")
    weight = normal(BATCH, QUERIES, HEADS, DIM)
    options = {
        "mask": MASKS[mask], "local_window_size": WINDOWS[window],
        "is_causal": is_causal, "scale": scale, **LENGTHS[lengths],
    }  # fmt: skip
    given = [q, k, v] if BIASES[bias] is None else [q, k, v, BIASES[bias]]
    # jax gives rows without a key the mean of the values.
    rows = jnp.swapaxes(seen(**options).any(axis=-1), 1, 2)

    def total(fn, *args):
        out, lse = fn(*args, return_residual=True, **options)
        if fn is sa.dot_product_attention:
            jax.debug.callback(empty_rows_are_empty, out, lse, rows)
        kept = jnp.where(rows[..., None], out, 0)
        return jnp.sum(kept * weight), (kept, jnp.where(rows, lse, 0))

    found, expected = (
        jax.jit(
            jax.value_and_grad(
                lambda *args, fn=fn: total(fn, *args),
                tuple(range(len(given))),
                has_aux=True,
            )
        )(*given)
        for fn in (sa.dot_product_attention, jax.nn.dot_product_attention)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found, expected
    )


def test_without_a_batch_and_with_a_spec():
    q, k, v = (normal(QUERIES, HEADS, DIM) for _ in "qkv")
    found = sa.dot_product_attention(q, k, v, spec="window(2)", is_causal=True)
    expected = jax.nn.dot_product_attention(
        q, k, v, local_window_size=(2, 0), is_causal=True
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_row_without_a_key_is_zero():
    q, k, v = (normal(BATCH, QUERIES, HEADS, DIM) for _ in "qkv")
    mask = jnp.arange(QUERIES)[:, None] > 0
    mask = jnp.broadcast_to(mask, (QUERIES, QUERIES))
    out, lse = sa.dot_product_attention(q, k, v, mask=mask, return_residual=True)
    assert not jnp.any(out[:, 0])
    assert jnp.all(lse[:, 0] == -jnp.inf)


def test_what_is_refused():
    q, k, v = (normal(BATCH, QUERIES, HEADS, DIM) for _ in "qkv")

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            sa.dot_product_attention(q, k, v, **options)

    refused(TypeError, "mask has dtype float32.*bias", mask=normal(QUERIES, QUERIES))
    refused(ValueError, r"mask has shape \(3, 7\)", mask=some(3, QUERIES))
    refused(ValueError, r"\(3,\).*2 batch entries", query_seq_lengths=jnp.arange(3))
    named = sa.where(lambda q, k: k < sa.operand("mask"))
    refused(ValueError, "reads an operand 'mask'", spec=named)
    wrong = jnp.ones(BATCH)
    refused(TypeError, "float32: it must hold integers", key_value_seq_lengths=wrong)
    refused(NotImplementedError, "linear.*is not one softmax", spec="linear()")
    refused(ValueError, "impl='cudnn'", implementation="cudnn")
