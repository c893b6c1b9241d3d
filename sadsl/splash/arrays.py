"""The functions and the arrays of the masks that have a name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sadsl.maps.base import at_least
from sadsl.maps.named import where

Shape = tuple[int, int]


def causal_pairs(offset: int) -> Callable[..., Any]:
    """``k <= q + offset``."""
    return lambda q, k: k <= (q + offset if offset else q)


def local_pairs(
    window_size: tuple[int | None, int | None], offset: int
) -> Callable[..., Any]:
    """``q - left + offset <= k <= q + right + offset``; None is no limit."""
    left, right = window_size

    def near(q: Any, k: Any) -> Any:
        before = True if left is None else q + (offset - left) <= k
        return before if right is None else (k <= q + (offset + right)) & before

    return near


def chunked_pairs(chunk_size: int) -> Callable[..., Any]:
    """``k <= q`` in the same chunk.

    Raises:
      ValueError: a chunk has no position.
    """
    at_least("ChunkedCausalMask", "chunk_size", chunk_size, 1)
    return lambda q, k: (q // chunk_size == k // chunk_size) & (k <= q)


def make_causal_mask(shape: Shape, offset: int = 0) -> np.ndarray:
    """The array of ``CausalMask``.

    Example:
      >>> from sadsl import splash
      >>> splash.make_causal_mask((2, 4), offset=1).astype(int)
      array([[1, 1, 0, 0],
             [1, 1, 1, 0]])
    """
    return where(causal_pairs(offset)).dense(*shape)[0]


def make_local_attention_mask(
    shape: Shape, window_size: tuple[int | None, int | None], *, offset: int = 0
) -> np.ndarray:
    """The array of ``LocalMask``.

    Example:
      >>> from sadsl import splash
      >>> splash.make_local_attention_mask((3, 3), (1, 0)).astype(int)
      array([[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]])
    """
    return where(local_pairs(window_size, offset)).dense(*shape)[0]


def make_chunk_attention_mask(shape: Shape, chunk_size: int) -> np.ndarray:
    """The array of ``ChunkedCausalMask``.

    Example:
      >>> from sadsl import splash
      >>> splash.make_chunk_attention_mask((3, 3), 2).astype(int)
      array([[1, 0, 0],
             [1, 1, 0],
             [0, 0, 1]])
    """
    return where(chunked_pairs(chunk_size)).dense(*shape)[0]


def make_random_mask(shape: Shape, sparsity: float, seed: int) -> np.ndarray:
    """Random pairs; those of ``jax``'s function for the same seed.

    Args:
      shape: the numbers of queries and keys.
      sparsity: the share of pairs that do not attend, in [0, 1].
      seed: of NumPy's ``RandomState``.

    Example:
      >>> from sadsl import splash
      >>> splash.make_random_mask((2, 2), 0.0, seed=0).all()
      np.True_
    """
    draw = np.random.RandomState(seed)
    return draw.binomial(n=1, p=1.0 - sparsity, size=shape).astype(bool)
