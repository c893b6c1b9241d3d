"""``release``: a sequence of a batch ends, and its place takes a new prompt."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from sadsl.decode.cache import DecodingCache
from sadsl.decode.keys import K, KeyStore, V
from sadsl.decode.pages import held_by, returned
from sadsl.run.linear_state import LinearState


def release(
    cache: DecodingCache, entries: int | Integer[Array, "*some"]
) -> DecodingCache:
    """Ends sequences of a ragged cache: they are empty again, and their pages free.

    A server calls it when an answer is complete, and then gives the next prompt to
    ``prefill``, with ``lengths`` of 0 for the sequences that wait. Paged or not, and
    inside of ``jit`` too.

    Args:
      cache: a cache of ``init_cache(..., ragged=True)``.
      entries: the indices of the sequences in the batch. Traced ones outside of the
        batch end nothing.

    Raises:
      ValueError: the cache is not ragged, or has no such sequence.
      TypeError: the entries are no integers.
      NotImplementedError: the spec has a recurrence, which takes no ``lengths``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> cache = sa.init_cache(
      ...     sa.causal(), 2, 8, 1, 4, ragged=True, page_size=2, num_pages=4
      ... )
      >>> x = jnp.ones((2, 3, 1, 4))
      >>> cache, _ = sa.prefill(cache, x, x, x)
      >>> cache = sa.release(cache, 0)
      >>> cache.length.tolist(), int(cache.keys.pages.left)
      ([0, 3], 2)
    """
    ended = _ended(cache, entries)
    keys = None if cache.keys is None else _without(cache.keys, ended)
    states = jax.tree.map(lambda x: _zeroed(x, ended), cache.states)
    length = jnp.where(ended, 0, jnp.asarray(cache.length, jnp.int32))
    return replace(cache, length=length, keys=keys, states=states)


def _ended(cache: DecodingCache, entries: Any) -> Bool[Array, " batch"]:
    """Which sequences end."""
    if not np.ndim(cache.length):
        raise ValueError(
            "release: the cache has one length for all sequences: pass ragged=True to "
            "init_cache"
        )
    leaves = jax.tree.leaves(cache.states, is_leaf=_is_recurrent)
    if any(map(_is_recurrent, leaves)):
        raise NotImplementedError(
            f"release with {cache.layout.term!r}: a recurrence takes no lengths, so no "
            "sequence of a batch can begin anew: use a cache for each sequence"
        )
    at, batch = jnp.asarray(entries), len(cache.length)
    if not jnp.issubdtype(at.dtype, jnp.integer):
        raise TypeError(f"release: entries have dtype {at.dtype}: pass integers")
    if not isinstance(at, jax.core.Tracer):
        for entry in np.ravel(np.asarray(at)):
            if not 0 <= entry < batch:
                raise ValueError(
                    f"release: entry {entry} is none of the {batch} sequences of the "
                    f"batch: pass 0 to {batch - 1}"
                )
    return jnp.isin(jnp.arange(batch), at)


def _is_recurrent(x: Any) -> bool:
    return isinstance(x, LinearState)


def _without(keys: KeyStore, ended: Bool[Array, " batch"]) -> KeyStore:
    """The store without the tokens of some sequences."""
    if keys.pages is None:
        return KeyStore({name: _zeroed(x, ended) for name, x in keys.rows.items()})
    free = held_by(keys.pages, ended)
    rows = {
        name: _zeroed(x, free if name in (K, V) else ended)
        for name, x in keys.rows.items()
    }
    return KeyStore(rows, returned(keys.pages, ended))


def _zeroed(x: Array, some: Bool[Array, " rows"]) -> Array:
    """An array with zeros in some of its first axis."""
    return jnp.where(some.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x)
