"""``attention_fn`` in Flax's own layers: masks, biases, a cache, segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import sadsl as sa
from sadsl.layers import attention_fn

BATCH, SEQ, HEADS, DIM, FEATURES = 2, 13, 2, 8, 16
SPEC = "causal() & (window(4) | sinks(1))"
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), "float32")


def some(*shape):
    """A random mask in which each query sees the first key."""
    mask = RNG.random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def qkv(queries=SEQ):
    return (
        normal(BATCH, queries, HEADS, DIM),
        *(normal(BATCH, SEQ, HEADS, DIM) for _ in "kv"),
    )


def close(found, expected, atol=3e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected
    )


def both(fn, *args, **options):
    """The outputs, and the gradients by all arrays."""

    def total(*args):
        return jnp.sum(fn(*args, **options) ** 2)

    gradient = jax.grad(total, tuple(range(len(args))))
    return jax.jit(lambda *args: (fn(*args, **options), gradient(*args)))(*args)


SHAPES = [
    (BATCH, HEADS, SEQ, SEQ),
    pytest.param((1, 1, SEQ, SEQ), marks=pytest.mark.slow),
    pytest.param((BATCH, 1, 1, SEQ), marks=pytest.mark.slow),
    pytest.param((SEQ, SEQ), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_mask_is_that_of_flax(shape):
    args, mask = qkv(), some(*shape)
    found = both(attention_fn("full()"), *args, mask=mask)
    close(found, both(nnx.dot_product_attention, *args, mask=mask))


def test_a_mask_limits_the_spec():
    args, mask = qkv(), some(BATCH, 1, SEQ, SEQ)
    pairs = jnp.asarray(sa.parse(SPEC).dense(SEQ)[0])[None, None]
    found = attention_fn(SPEC)(*args, mask=mask)
    rows = jnp.any(mask & pairs, axis=(1, 3))[..., None, None]
    expected = nnx.dot_product_attention(*args, mask=mask & pairs)
    close(found, jnp.where(rows, expected, 0))


@pytest.mark.parametrize(
    "dtype", [bool, pytest.param("float32", marks=pytest.mark.slow)]
)
def test_padding_of_a_causal_model(dtype):
    """Rows of padding are 0; all others are those of Flax."""
    args = qkv()
    real = jnp.arange(SEQ)[None] < jnp.array([[9], [13]])
    mask = nnx.combine_masks(
        nnx.make_attention_mask(real, real), nnx.make_causal_mask(real), dtype=dtype
    )
    kept = real[..., None, None]
    found = attention_fn("causal()", mask="padding")(*args, mask=mask)
    expected = nnx.dot_product_attention(*args, mask=mask)
    close(found, jnp.where(kept, expected, 0))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((BATCH, HEADS, SEQ, SEQ), marks=pytest.mark.slow),
        pytest.param((1, HEADS, 1, 1), marks=pytest.mark.slow),
        (SEQ,),
    ],
)
def test_a_bias_is_that_of_flax(shape):
    args = (*qkv(), normal(*shape))
    mask = some(BATCH, 1, SEQ, SEQ)
    found = both(attention_fn("full()"), *args, mask=mask)
    expected = both(nnx.dot_product_attention, *args, mask=mask)
    close(found, expected, 1e-4)


def test_arguments_that_change_nothing():
    args = qkv()
    expected = attention_fn(SPEC)(*args)
    for precision in (jax.lax.Precision.DEFAULT, "highest", ("high", "default")):
        found = attention_fn(SPEC)(*args, precision=precision)
        np.testing.assert_array_equal(found, expected)


def test_more_batch_axes():
    q, k, v = (normal(3, *x.shape) for x in qkv())
    mask = some(1, BATCH, 1, SEQ, SEQ)
    found = attention_fn("full()")(q, k, v, mask=mask)
    whole = jnp.broadcast_to(mask, (3, BATCH, HEADS, SEQ, SEQ))
    close(found, nnx.dot_product_attention(q, k, v, mask=whole))


def test_one_query_takes_dropout_where_no_position_matters():
    """As the probe of a pooling head does."""
    args, mask = qkv(queries=1), some(BATCH, 1, 1, SEQ)
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    found = attention_fn("full()")(*args, mask=mask, **options)
    assert found.shape == args[0].shape
    with pytest.raises(NotImplementedError, match="dropout follows from positions"):
        attention_fn("causal()")(*args, mask=mask, **options)


@pytest.mark.parametrize(
    "mask", [None, "implied", pytest.param("padding", marks=pytest.mark.slow)]
)
def test_the_cache_of_nnx(mask):
    x = normal(BATCH, SEQ, FEATURES)
    layer = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=attention_fn(SPEC, mask=mask), decode=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    expected = layer(x)
    layer.init_cache((BATCH, SEQ, FEATURES))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    found = [step(layer, x[:, i : i + 1]) for i in range(SEQ)]
    close(jnp.concatenate(found, axis=1), expected)


def test_steps_of_several_queries():
    """The mask says where they stand, one place for each batch entry."""
    q, k, v = qkv()
    fn, slots = attention_fn(SPEC, mask="cache"), np.arange(SEQ)
    at = np.array([5, 9])[:, None] + np.arange(4)
    mask = (slots <= at[..., None]) & (slots != 3)
    now = jnp.take_along_axis(q, at[..., None, None], axis=1)
    found = jax.jit(lambda *xs: fn(*xs[:3], mask=xs[3]))(now, k, v, mask[:, None])
    pairs = sa.parse(SPEC).dense(SEQ, SEQ)[0][at] & mask
    close(found, nnx.dot_product_attention(now, k, v, mask=pairs[:, None]))


@pytest.mark.slow
def test_the_cache_of_linen():
    x = normal(BATCH, SEQ, FEATURES)
    options = {"num_heads": HEADS, "attention_fn": attention_fn(SPEC)}
    layer = linen.MultiHeadDotProductAttention(**options)
    variables = layer.init(jax.random.key(0), x)
    expected = layer.apply(variables, x)
    decoding = linen.MultiHeadDotProductAttention(**options, decode=True)
    cache = decoding.init(jax.random.key(0), x)["cache"]

    @jax.jit
    def step(cache, x):
        given = {**variables, "cache": cache}
        out, changed = decoding.apply(given, x, mutable=["cache"])
        return out, changed["cache"]

    found = []
    for i in range(SEQ):
        out, cache = step(cache, x[:, i : i + 1])
        found.append(out)
    close(jnp.concatenate(found, axis=1), expected)


def test_a_mask_that_the_spec_implies():
    args = qkv()
    mask = nnx.make_causal_mask(jnp.ones((BATCH, SEQ)))
    implied = attention_fn("causal()", mask="implied", check_mask=True)
    np.testing.assert_array_equal(implied(*args, mask=mask), implied(*args))
    wrong = mask.at[1, 0, 5, 2].set(0)
    with pytest.raises(
        ValueError, match="2 pairs differ, the first at head 0, query 5"
    ):
        implied(*args, mask=wrong)
    trusting = attention_fn("causal()", mask="implied")
    np.testing.assert_array_equal(trusting(*args, mask=wrong), implied(*args))


def test_documents():
    args = qkv()
    ids = jnp.asarray([[0] * 5 + [1] * 8, [0] * 13], jnp.int32)
    fn = attention_fn("causal() & segments()", kv_segment_ids=ids)
    expected = sa.attention(
        *args, "causal() & segments()", q_segment_ids=ids, kv_segment_ids=ids
    )
    np.testing.assert_array_equal(fn(*args), expected)
    assert fn == fn
    assert fn != attention_fn("causal() & segments()", kv_segment_ids=ids)


def test_what_is_refused():
    args = qkv()

    def refused(error, match, spec="causal()", **options):
        with pytest.raises(error, match=match):
            attention_fn(spec)(*args, **options)

    refused(
        ValueError,
        r"mask has shape \(1, 1, 5, 13\): it must broadcast",
        mask=some(5, SEQ),
    )
    refused(ValueError, "batch axes", mask=some(3, 1, 1, SEQ))
    refused(ValueError, r"bias has shape \(1, 1, 1, 7\)", bias=normal(7))
    mask = some(1, 1, SEQ, SEQ)
    refused(NotImplementedError, "mask of shape.*linear", "linear()", mask=mask)
    refused(NotImplementedError, "is_causal=True: linear", "linear()", is_causal=True)
    mixture = "average(causal(), window(2))"
    refused(NotImplementedError, "bias of shape.*average", mixture, bias=normal(SEQ))
    for options, match in (
        ({"mask": "any"}, "mask='any' must be None or one of"),
        ({"check_mask": True}, "needs mask='implied'"),
        ({"q_segment_ids": jnp.zeros((1, 4), int)}, "without kv_segment_ids"),
    ):
        with pytest.raises(ValueError, match=match):
            attention_fn("causal()", **options)
