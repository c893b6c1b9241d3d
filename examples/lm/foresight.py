"""Tests a model for seeing the future; it works for any spec."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.model import NUM_BYTES, LanguageModel, ModelConfig, Spec

# Rounding differs where other blocks are visited; a leak is of the order of one.
TOLERANCE = 1e-4


class Foresight(NamedTuple):
    """How much later bytes change earlier logits, relative to the logits.

    ``values``: the largest gradient of earlier logits at a later position. Choices have
    no gradient, so this shows whether values pass. ``choices``: the largest change of
    earlier logits when later bytes are replaced, by whatever path.
    """

    values: float
    choices: float


def foresight(spec: Spec, sizes: ModelConfig, seq_len: int, seed: int = 0) -> Foresight:
    """Tests a model with random weights on random bytes, cut at several places."""
    model = LanguageModel(sizes, spec, nnx.Rngs(seed))
    model.eval()
    graph, params, others = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(seed)
    params = _no_zeros(params, rng)
    cuts = np.array(sorted({1, seq_len // 3, seq_len // 2 + 1, seq_len - 1}))
    before = np.arange(seq_len) < cuts[:, None]
    text, other = rng.integers(0, NUM_BYTES, (2, seq_len))
    pull_of = rng.standard_normal((len(cuts), seq_len, NUM_BYTES), np.float32)
    texts = np.where(before, text, other).astype(np.int32)
    whole = np.broadcast_to(text.astype(np.int32), texts.shape)

    @jax.jit
    def seen(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params, others, copy=True)
        logits, pull = jax.vjp(model.logits, model.embedded(tokens))
        (gradient,) = pull(jnp.where(before[..., None], pull_of, 0.0))
        return logits, jnp.abs(gradient).max(axis=-1)

    logits, gradient = (np.asarray(x) for x in seen(whole))
    replaced, _ = (np.asarray(x) for x in seen(texts))
    changed = np.abs(replaced - logits).max(axis=-1)
    return Foresight(
        values=float(gradient[~before].max() / gradient[before].max()),
        choices=float(changed[before].max() / np.abs(logits).max()),
    )


def refuse(name: str, spec: Spec, found: Foresight, *, chooses_ahead: bool) -> None:
    """Checks that a byte is not predicted from itself.

    Raises:
      ValueError: values of later bytes reach a query, or its keys are chosen by later
        bytes, and ``chooses_ahead`` does not allow for that.
    """
    if not found.values <= TOLERANCE:
        raise ValueError(
            f"{name}: {spec!r} lets a query see later bytes (relative gradient "
            f"{found.values:.1e}), so a byte would be predicted from itself: make it "
            "causal"
        )
    if not (chooses_ahead or found.choices <= TOLERANCE):
        raise ValueError(
            f"{name}: {spec!r} decides by later bytes what a query sees (logits change "
            f"by {found.choices:.1e} of the largest): choose among keys of the past, "
            "query by query, or declare that it looks ahead"
        )


def _no_zeros(params: nnx.State, rng: np.random.Generator) -> nnx.State:
    """Adds noise to every parameter: zeros would hide the layers before them."""

    def noisy(x: jax.Array) -> jax.Array:
        noise = 0.1 * rng.standard_normal(x.shape)
        return jnp.asarray(np.asarray(x) + noise.astype(x.dtype))

    return jax.tree.map(noisy, params)
