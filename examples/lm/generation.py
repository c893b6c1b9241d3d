"""Continues a prompt, one byte after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.model import NUM_BYTES, LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen.

    Attributes:
      temperature: 0 takes the most likely byte; else bytes are drawn from the softmax
        of the logits divided by it.
      top_k: only so many of the most likely bytes are drawn; None for all.
      seed: decides on what is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"--temperature={self.temperature} must be at least 0: 0 takes the "
                "most likely byte"
            )
        if self.top_k is not None and not 1 <= self.top_k <= NUM_BYTES:
            raise ValueError(
                f"--top_k={self.top_k} must be from 1 to {NUM_BYTES}, the number of "
                "bytes"
            )

    def next(self, logits: jax.Array, step: jax.Array) -> jax.Array:
        """The next byte of each sequence, from logits ``[batch, 256]``."""
        if not self.temperature:
            return logits.argmax(axis=-1).astype(jnp.int32)
        if self.top_k is not None:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        drawn = jax.random.categorical(key, logits / self.temperature)
        return drawn.astype(jnp.int32)


def checked(prompt: Sequence[int]) -> np.ndarray:
    """The prompt as an array ``[1, length]``.

    Raises:
      ValueError: it is empty, or has a number that is no byte.
    """
    tokens = np.asarray(list(prompt), np.int64)
    if not len(tokens):
        raise ValueError("the prompt is empty: give at least one byte to continue")
    wrong = np.flatnonzero((tokens < 0) | (tokens >= NUM_BYTES))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"token {at} of the prompt is {tokens[at]}: the vocabulary has the bytes 0 "
            f"to {NUM_BYTES - 1}"
        )
    return tokens[None].astype(np.int32)


def generate(
    model: LanguageModel, prompt: Sequence[int], count: int, how: Sampling
) -> Iterator[int]:
    """Yields ``count`` bytes that follow the prompt, as soon as each is known.

    Raises:
      ValueError: the prompt or the count do not fit.
      NotImplementedError: the spec of the model has no cache.
    """
    tokens = checked(prompt)
    if count < 1:
        raise ValueError(f"--count={count} must be at least 1")
    graph, state = nnx.split(model)
    caches = model.init_caches(1, tokens.shape[1] + count)

    def feed(state: Any, tokens: Any, last: Any, caches: Any, step: Any) -> Any:
        logits, caches = nnx.merge(graph, state).decode(tokens, last, caches)
        return how.next(logits[:, -1], step), caches

    feed = jax.jit(feed, donate_argnums=3)
    last = jnp.zeros(1, jnp.int32)
    for step in range(count):
        found, caches = feed(state, tokens, last, caches, step)
        last, tokens = tokens[:, -1], found[:, None]
        yield int(found[0])
