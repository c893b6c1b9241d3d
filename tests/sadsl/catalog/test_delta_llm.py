"""DeltaLLM's reconstruction: its keys by a loop, its outputs by one dense softmax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from calls import BACKENDS

import sadsl as sa
from sadsl import catalog

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

SIZES = 1, 13, 37, 130
HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 6, 5
THETA, WINDOW = 0.4, 5


def arrays(n, seed=0, dtype="float32"):
    """q, walks of keys that move slowly, v, and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V), (HEADS, DIM_V)
    q, k, v, do = (rng.normal(size=(2, n, *shape)) for shape in shapes)
    k = 0.3 * k.cumsum(axis=1)
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, do))


def followed(k, theta):
    """Reference keys and updates by a loop, and the position that each is of."""
    k = np.asarray(k, np.float64)
    reference, source = k[:, 0].copy(), np.zeros(k[:, 0].shape, int)
    keys, updated, sources = [], [], []
    for t in range(k.shape[1]):
        moved = (
            np.ones_like(source, bool) if t == 0 else abs(k[:, t] - reference) > theta
        )
        for at in np.argwhere(moved):
            reference[tuple(at)], source[tuple(at)] = k[:, t][tuple(at)], t
        keys.append(reference.copy())
        updated.append(moved)
        sources.append(source.copy())
    return (np.stack(x, axis=1) for x in (keys, updated, sources))


def by_definition(q, k, v, do, sources):
    """Output, lse and gradients in float64: merged logits before one softmax.

    ``sources`` says from which position each element of a reference key was taken, so
    the gradient of a reference key goes there.
    """
    group = HEADS // KV_HEADS

    def loss(q, k, v):
        reference = jnp.take_along_axis(k, jnp.asarray(sources), axis=1)
        exact, far, values = (jnp.repeat(x, group, axis=2) for x in (k, reference, v))
        at = jnp.arange(k.shape[1])
        distance = at[:, None] - at[None, :]
        scores = [jnp.einsum("bihd,bjhd->bhij", q, x) * DIM**-0.5 for x in (exact, far)]
        logits = jnp.where((distance <= WINDOW)[None, None], *scores)
        logits = jnp.where((distance >= 0)[None, None], logits, -jnp.inf)
        out = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(logits), values)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(out * do) + jnp.sum(lse), (out, lse)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, do)]
        *wide, do = wide
        gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        found, (out, lse) = gradient(*wide)
        return [np.asarray(x) for x in (out, lse, *found)]


def call(q, k, v, do, **options):
    attend = partial(catalog.delta_llm, window=WINDOW, return_lse=True, **options)
    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, *pull((do, jnp.ones_like(lse)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("n", SIZES)
def test_reference_keys_are_those_of_a_loop(n):
    _, k, _, _ = arrays(n)
    follow = jax.jit(catalog.reference_keys)
    for theta in (0.0, 0.4, 1e9):
        found = follow(k, theta)
        keys, updated, _ = followed(k, theta)
        np.testing.assert_array_equal(found.keys, keys.astype(np.float32))
        np.testing.assert_array_equal(found.updated, updated)
        assert float(abs(found.keys - k).max()) <= theta
        if theta == 0.4 and n > 13:
            assert 0.1 < updated.mean() < 0.9


CALLS = [
    pytest.param(impl, n, marks=() if (impl, n) == ("xla", 13) else pytest.mark.slow)
    for impl in BACKENDS
    for n in SIZES
]


@pytest.mark.parametrize(("impl", "n"), CALLS)
def test_values_and_gradients(impl, n):
    q, k, v, do = arrays(n)
    *_, sources = followed(k, THETA)
    wanted = by_definition(q, k, v, do, sources)
    found = jax.jit(partial(call, theta=THETA, impl=impl, **BACKENDS[impl]))(
        q, k, v, do
    )
    for name, a, b in zip(["o", "lse", "q", "k", "v"], found, wanted, strict=True):
        oracle.assert_close(a, b, "float32", f"{impl} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    q, k, v, do = arrays(37, dtype=dtype)
    *_, sources = followed(k, THETA)
    wanted = by_definition(q, k, v, do, sources)
    found = jax.jit(partial(call, theta=THETA))(q, k, v, do)
    for a, b in zip(found, wanted, strict=True):
        oracle.assert_close(a, b, dtype)


def near(**options):
    """One program for all thetas: theta is traced."""
    options = {"window": WINDOW, "impl": "reference", "return_lse": True, **options}
    return jax.jit(partial(catalog.delta_llm, **options))


def dense(q, k, v):
    return sa.attention(q, k, v, sa.causal(), impl="reference", return_lse=True)


def test_theta_zero_is_dense_attention():
    q, k, v, _ = arrays(37)
    wanted, attend = dense(q, k, v), near()
    for x, y in zip(attend(q, k, v, 0.0), wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)
    assert float(abs(attend(q, k, v, THETA)[0] - wanted[0]).max()) > 1e-3


@pytest.mark.slow
def test_a_window_of_all_keys_is_dense_attention():
    q, k, v, _ = arrays(37)
    found = near(window=36)(q, k, v, 0.5)
    for x, y in zip(found, dense(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.slow
def test_later_tokens_change_nothing_and_queries_may_be_late():
    q, k, v, _ = arrays(37)
    whole, _ = near()(q, k, v, THETA)
    # A chunk of decoding is the end of the whole.
    last, _ = near(q_offset=35)(q[:, -2:], k, v, THETA)
    np.testing.assert_allclose(last, whole[:, -2:], atol=2e-6)
    others = zip((q, k, v), arrays(37, seed=1), strict=False)
    mixed = [jnp.concatenate([x[:, :20], y[:, 20:]], axis=1) for x, y in others]
    other, _ = near()(*mixed, THETA)
    np.testing.assert_allclose(other[:, :20], whole[:, :20], atol=2e-6)
    assert float(abs(other[:, 20:] - whole[:, 20:]).max()) > 0.1


@pytest.mark.parametrize("theta", [-0.1, float("nan"), float("inf")])
def test_a_theta_that_is_no_distance_is_refused(theta):
    q, k, v, _ = arrays(13)
    with pytest.raises(ValueError, match=r"theta=.* must be finite and at least 0"):
        catalog.delta_llm(q, k, v, theta)


def test_a_negative_window_is_refused():
    q, k, v, _ = arrays(13)
    with pytest.raises(ValueError, match=r"window=-1 must be at least 0"):
        catalog.delta_llm(q, k, v, 0.1, -1)
