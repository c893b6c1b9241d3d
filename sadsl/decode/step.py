"""``prefill`` and ``step``: new tokens on a cache."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.decode.advance import NewTokens, advance
from sadsl.decode.cache import DecodingCache
from sadsl.decode.choices import token_parts
from sadsl.decode.keys import (
    K,
    KeyStore,
    NewEntries,
    Seen,
    V,
    positions_of,
    seen,
    written,
)
from sadsl.decode.layout import of_one_length, token_maps
from sadsl.decode.pages import check_room
from sadsl.run import checks
from sadsl.run.backends import choose_impl
from sadsl.run.call import given_arrays
from sadsl.run.types import QKV, Setting
from sadsl.terms.base import reads


def prefill(
    cache: DecodingCache,
    q: Float[Array, "batch seq num_q_heads head_dim"],
    k: Float[Array, "batch seq num_kv_heads head_dim"],
    v: Float[Array, "batch seq num_kv_heads head_dim_v"],
    *,
    lengths: Integer[Array, " batch"] | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    impl: str | None = None,
    interpret: Any = False,
    config: KernelConfig | None = None,
) -> tuple[DecodingCache, Float[Array, "batch seq num_q_heads head_dim_v"]]:
    """Adds tokens to a cache, and returns the new cache and their outputs.

    Call it once with a whole prompt, or several times with pieces of it. The outputs
    are the rows of ``attention`` over all tokens. One compiled call serves every
    position. The first call makes its plan while it is traced, if it is known then that
    the cache is empty: outside of ``jit``, or where ``init_cache`` is inside of it. It
    reads no cache. Later calls with over 16 tokens copy the pages of a paged cache.

    Args:
      cache: of ``init_cache``, or of an earlier call.
      q, k, v: the new tokens, as in ``attention``. Rotary positions are the caller's:
        the first token is at ``cache.length``.
      lengths: how many of the tokens exist in each sequence, for prompts of several
        lengths, with padding behind them; of ragged caches only. Outputs of padding
        have no meaning.
      q_segment_ids, kv_segment_ids, operands: as in ``attention``, for the new tokens
        alone. What has no axis of tokens is given to every call.
      sm_scale, impl, interpret, config: as in ``attention``.

    Raises:
      ValueError: the cache is too short, or has too few free pages, or arrays do not
        fit it. If the length is traced, the outputs of tokens beyond the cache are NaN
        instead; and if a sequence found no page, all of its outputs until ``release``.
      NotImplementedError: a part of the spec cannot be continued like this.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> cache = sa.init_cache(sa.causal(), 1, 8, num_kv_heads=1, head_dim=1)
      >>> x, v = jnp.zeros((1, 3, 1, 1)), jnp.arange(3.0).reshape(1, 3, 1, 1)
      >>> cache, out = sa.prefill(cache, x, x, v)
      >>> out.ravel().tolist(), int(cache.length)
      ([0.0, 0.5, 1.0], 3)
    """
    given = given_arrays(operands, q_segment_ids, kv_segment_ids)
    impl = choose_impl(impl, interpret, q, k, v)
    scale = checks.scale(sm_scale, q.shape[-1])
    setting = Setting(scale, 0, impl, interpret, config or KernelConfig())
    checks.problem(q, k, v, 0, cache.layout.term)
    checks.precision(q.dtype, impl)
    _check_arrays(cache, given, lengths, len(q))
    _check(cache, (q, k, v), lengths)
    return _advanced(cache, (q, k, v), given, lengths, setting)


def _advanced(
    cache: DecodingCache, inputs: QKV, given: dict[str, Any], lengths: Any,
    setting: Setting,
) -> tuple[DecodingCache, Array]:  # fmt: skip
    """The cache with checked new tokens, and their outputs."""
    q, k, v = inputs
    valid: Any = q.shape[1] if lengths is None else jnp.asarray(lengths, jnp.int32)
    length = jnp.asarray(cache.length, jnp.int32)
    layout = cache.layout
    first = _is_known(cache.length) and not np.any(np.asarray(cache.length))
    maps = token_maps(layout.term, layout.num_heads)
    first = first and not of_one_length(a for a, _ in maps)
    given |= _token_parts(cache, (q, k), given, length)
    keys, visible = _with_keys(cache, (k, v), given, valid)
    new = NewTokens(
        inputs, visible, cache.axes, given, length, valid, layout.max_len, first,
        setting,
    )  # fmt: skip
    found, states = advance(layout.term, cache.states, new)
    after = replace(cache, length=length + valid, keys=keys, states=states)
    return after, _where_held(found.out, length, after)


def step(
    cache: DecodingCache,
    q: Float[Array, "batch num_q_heads head_dim"],
    k: Float[Array, "batch num_kv_heads head_dim"],
    v: Float[Array, "batch num_kv_heads head_dim_v"],
    **options: Any,
) -> tuple[DecodingCache, Float[Array, "batch num_q_heads head_dim_v"]]:
    """Adds one token of each sequence to a cache: ``prefill`` without an axis of it.

    Args:
      cache: of ``init_cache``, or of an earlier call.
      q, k, v: the new token; k and v ``[batch, keys, ...]`` if it writes several.
      **options: those of ``prefill``. Arrays in ``operands`` keep the axis of tokens,
        of length one.

    Raises:
      ValueError, NotImplementedError: as ``prefill``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sadsl as sa
      >>> cache = sa.init_cache("window(1)", 1, 9, num_kv_heads=1, head_dim=1)
      >>> step = jax.jit(sa.step)
      >>> for i in range(4):
      ...     x, v = jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), float(i))
      ...     cache, out = step(cache, x, x, v)
      >>> float(out[0, 0, 0])  # the mean of 2 and 3
      2.5
    """
    k, v = (x[:, None] if x.ndim == 3 else x for x in (k, v))
    cache, out = prefill(cache, q[:, None], k, v, **options)
    return cache, out[:, 0]


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _check_arrays(
    cache: DecodingCache, given: Mapping[str, Any], lengths: Any, batch: int
) -> None:
    """Checks the arrays beside the new tokens.

    Raises:
      ValueError: nothing reads one, or lengths have no meaning or another shape.
    """
    for name in given:
        if not reads(cache.layout.term, name):
            raise ValueError(
                f"{name!r} was given, but {cache.layout.term!r} does not read it: drop "
                "it"
            )
    if lengths is None:
        return
    if not np.ndim(cache.length):
        raise ValueError(
            "lengths were given, but the cache has one length for all sequences: pass "
            "ragged=True to init_cache"
        )
    if jnp.shape(lengths) != (batch,) or not jnp.issubdtype(
        jnp.result_type(lengths), jnp.integer
    ):
        raise ValueError(
            f"lengths have shape {jnp.shape(lengths)} and dtype "
            f"{jnp.result_type(lengths)}: pass an integer for each of the {batch} "
            "sequences"
        )


def _check_length(cache: DecodingCache, lengths: Any, count: int) -> None:
    """Checks that new tokens do not exceed the cache, as far as lengths are known.

    Raises:
      ValueError: they do.
    """
    max_len = cache.layout.max_len
    if count > max_len:
        raise ValueError(
            f"{count} tokens do not fit a cache of max_len={max_len}: make it longer"
        )
    if lengths is not None and not _is_known(lengths):
        return
    new = np.asarray(count if lengths is None else lengths)
    if np.any((new > count) | (new < 0)):
        raise ValueError(f"lengths={new} must be from 0 to the {count} tokens given")
    if not _is_known(cache.length):
        return
    held = np.asarray(cache.length)
    if np.any(held + new > max_len):
        raise ValueError(
            f"the cache holds {held.max()} tokens, and {new.max()} more exceed its "
            f"max_len={max_len}: make it longer"
        )


def _check(
    cache: DecodingCache, inputs: tuple[Array, Array, Array], lengths: Any
) -> None:
    """Checks the new tokens against the cache.

    Raises:
      ValueError: they do not fit it.
    """
    q, k, v = inputs
    layout, count = cache.layout, q.shape[1]
    _check_length(cache, lengths, count)
    if q.shape[2] != layout.num_heads:
        raise ValueError(
            f"q has {q.shape[2]} heads, and the cache is for num_heads="
            f"{layout.num_heads}: pass num_heads to init_cache"
        )
    if cache.keys is None:
        return
    pages = cache.keys.pages
    if pages is not None:
        check_room(pages, cache.length, count if lengths is None else lengths)
    batch = len(cache.keys.k if pages is None else pages.table)
    for name, x, kept in (("k", k, cache.keys.k), ("v", v, cache.keys.v)):
        if kept is None:
            continue
        wanted = batch, count, kept.shape[1], kept.shape[3]
        if x.shape != wanted or x.dtype != kept.dtype:
            raise ValueError(
                f"{name} has shape {x.shape} and dtype {x.dtype}: this cache takes "
                f"{wanted} of {kept.dtype}"
            )


def _with_keys(
    cache: DecodingCache, new: tuple[Array, Array], given: Mapping[str, Any], valid: Any
) -> tuple[KeyStore | None, Seen | None]:
    """The keys with the new ones, and those that the new queries may see.

    Raises:
      ValueError: an array that is kept was not given.
    """
    if cache.keys is None:
        return None, None
    slots = cache.layout.slots
    assert slots is not None
    k, v = (jnp.swapaxes(x, 1, 2) for x in new)
    size = k.shape[2]
    others = {
        name: _new_entries(name, cache, given, size) for name, _ in cache.layout.axes
    }
    length = jnp.asarray(cache.length, jnp.int32)
    added = NewEntries({K: k, V: v, **others}, size, length, valid)
    after = written(cache.keys, added, slots, cache.axes)
    return after, seen(cache.keys, after, added, slots, cache.axes)


def _token_parts(
    cache: DecodingCache, inputs: tuple[Array, Array], given: Mapping[str, Any],
    length: Array,
) -> dict[str, Array]:  # fmt: skip
    """The parts of choices that belong to the new tokens; none of them are given."""
    if cache.keys is None:
        return {}
    slots = cache.layout.slots
    assert slots is not None
    there = jnp.atleast_2d(slots.positions(length) >= 0)
    made = token_parts(cache.layout.term, inputs, given, cache.keys.rows, there)
    return {name: x for name, x in made.items() if name not in given}


def _new_entries(
    name: str, cache: DecodingCache, given: Mapping[str, Any], count: int
) -> Array:
    """The entries of new tokens of an array that is kept.

    Raises:
      ValueError: they were not given, or have another shape.
    """
    if name not in given:
        raise ValueError(
            f"the cache keeps {name!r}, which was not given: pass its entries for the "
            f"{count} new tokens"
        )
    assert cache.keys is not None
    kept, axis, x = cache.keys.rows[name], cache.axes[name], jnp.asarray(given[name])
    x = x if x.ndim == kept.ndim else x[None]
    wanted = (*kept.shape[:axis], count, *kept.shape[axis + 1 :])
    if x.shape not in (wanted, (1, *wanted[1:])):
        raise ValueError(
            f"operand {name!r} has shape {x.shape}: the cache keeps it, and needs its "
            f"entries for the new tokens, {wanted}"
        )
    return x


def _where_held(out: Array, length: Array, after: DecodingCache) -> Array:
    """The outputs, NaN for tokens beyond the cache, or if the sequence lacks a page."""
    at = positions_of(length, out.shape[1])
    held = jnp.atleast_2d(at < after.layout.max_len)
    if after.keys is not None and after.keys.pages is not None:
        held &= after.keys.pages.complete(after.length)[:, None]
    return jnp.where(held[:, :, None, None], out, jnp.nan).astype(out.dtype)
