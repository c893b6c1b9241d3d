"""The parts of linear layers: published vectors, documents, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors_of import assert_agrees, cases

from sadsl.layers import parts

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

convolution = jax.jit(parts.short_convolution, static_argnames="activation")
norm = jax.jit(
    parts.gated_rms_norm, static_argnames=("activation", "eps", "group", "gate_first")
)
decay_gate = jax.jit(parts.decay_gate, static_argnames="lower")
hgrn2_gates = jax.jit(parts.hgrn2_gates, static_argnames="lower")
MODELS = "qwen3_next", "kimi_linear", "bailing_hybrid"


def arrays_of(name, case):
    found, options = cases(name)[case]
    return {key: jnp.asarray(x) for key, x in found.items()}, options


@pytest.mark.parametrize("name", MODELS)
def test_gates_of_published_models(name):
    a, options = arrays_of(name, "gates")
    x = a["a"] if "a" in a else a["f"]
    g = decay_gate(x, a["A_log"], a["dt_bias"], lower=options.get("lower"))
    assert_agrees(g, a["g"], "g")
    assert_agrees(parts.write_strength(a["b"]), a["beta"], "beta")


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_of_published_models(name):
    a, options = arrays_of(name, "conv")
    out, last = convolution(a["x"], a["weight"], activation=options["activation"])
    assert_agrees(out, a["out"], "out")
    np.testing.assert_array_equal(last, a["x"][:, -3:])
    # In two pieces, the second of one token.
    first, before = convolution(a["x"][:, :-1], a["weight"])
    second, last = convolution(a["x"][:, -1:], a["weight"], before=before)
    assert_agrees(jnp.concatenate([first, second], axis=1), a["out"], "out")
    np.testing.assert_array_equal(last, a["x"][:, -3:])


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_published_models(name):
    a, options = arrays_of(name, "norm")
    found = norm(
        a["norm_in"], a["norm_weight"], a["norm_gate"],
        activation=options["activation"], eps=options["eps"],
    )  # fmt: skip
    assert_agrees(found, a["norm_out"], "norm_out")


def test_the_norm_of_mamba_2_comes_after_the_gate():
    a, options = arrays_of("nemotron_h_mamba2", "norm")
    found = norm(
        a["norm_in"], a["norm_weight"], a["norm_gate"],
        eps=options["eps"], group=options["group"], gate_first=True,
    )  # fmt: skip
    assert_agrees(found, a["norm_out"], "norm_out")


def test_gates_of_hgrn2():
    f = jnp.asarray(cases("fla_gla")["hgrn2"][0]["f"])
    wide = np.asarray(f, np.float64)
    for lower in (0.0, 0.75):
        g, k = hgrn2_gates(f, lower=lower)
        kept = lower + (1 - lower) / (1 + np.exp(-wide))
        assert_agrees(g, np.log(kept), f"g, {lower}")
        assert_agrees(k, 1 - kept, f"k, {lower}")
    # Where nearly all is kept, the key is small, not 0.
    assert float(parts.hgrn2_gates(jnp.float32(30))[1]) == pytest.approx(np.exp(-30))


def test_slow_decays():
    x = np.linspace(-30, 30, 7)
    found = parts.slow_decay(jnp.asarray(x, jnp.float32), 8.0)
    assert_agrees(found, -np.log1p(np.exp(-x)) / 8, "slow decay")


def convolved(x, weight, ids):
    """By loops: a token and its neighbours back to the start of its piece."""
    out, width = np.zeros(x.shape), weight.shape[1]
    for b, t in np.ndindex(*ids.shape):
        for back in range(width):
            if t - back < 0 or ids[b, t - back] != ids[b, t]:
                break
            out[b, t] += weight[:, width - 1 - back] * x[b, t - back]
    return out


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolutions_stay_within_documents(width):
    rng = np.random.default_rng(width)
    x, weight = rng.normal(size=(2, 13, 3)), rng.normal(size=(3, width))
    ids = np.array([[0] * 5 + [1] + [0] * 2 + [2] * 5, [3] * 13])
    wanted = convolved(x, weight, ids)
    narrow = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
    whole, last = convolution(*narrow, segment_ids=jnp.asarray(ids), activation=None)
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    assert last.shape == (2, width - 1, 3)
    # The last of a piece does not keep the tokens before the piece.
    _, last = convolution(
        narrow[0][:, :6], narrow[1], segment_ids=jnp.asarray(ids[:, :6])
    )
    np.testing.assert_array_equal(last[0, : width - 2], 0)


def test_gradients_are_finite_at_the_ends():
    x = jnp.array([[[-100.0], [0.0], [100.0]]])
    bias = jnp.zeros(1)

    def total(x):
        return (
            parts.decay_gate(x, bias, bias).sum()
            + parts.decay_gate(x, bias, bias, lower=-5.0).sum()
            + parts.slow_decay(x).sum()
            + sum(y.sum() for y in parts.hgrn2_gates(x, 0.5))
            + parts.gated_rms_norm(x * 0, jnp.ones(1), x).sum()
        )

    assert np.isfinite(jax.jit(jax.grad(total))(x)).all()


def test_what_parts_refuse():
    x = jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match=r"lower=0.5 must be below 0"):
        parts.decay_gate(x, jnp.ones(4), jnp.ones(4), 0.5)
    with pytest.raises(ValueError, match=r"lower=1.0 must be in \[0, 1\)"):
        parts.hgrn2_gates(x, 1.0)
    with pytest.raises(ValueError, match=r"group=3 must divide the 4 channels"):
        parts.gated_rms_norm(x, jnp.ones(4), group=3)
