"""What terms without cached keys keep of earlier tokens: recurrent states, entries."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sadsl.decode.advance import NewTokens, advance
from sadsl.maps.base import IndexMap
from sadsl.run import traced_offset
from sadsl.run.attend import attend
from sadsl.run.compressed import pooled
from sadsl.run.linear_state import LinearState, empty_state
from sadsl.run.over import over_entries
from sadsl.run.types import Outcome, Setting
from sadsl.terms.base import STATE, Spec, read_by
from sadsl.terms.compressed import Compressed
from sadsl.terms.heads import Heads
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.mixtures import Mixture, Weighted
from sadsl.terms.moved import OFFSET
from sadsl.terms.over import Over
from sadsl.terms.recurrent import Recurrent
from sadsl.terms.softmax import Softmax


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of a cache, and the arrays of one token of a call.

    ``arrays`` are arrays or their shapes and dtypes, and functions.
    """

    batch: int
    max_len: int
    num_heads: int
    num_kv_heads: int
    num_v_heads: int
    head_dim: int
    head_dim_v: int
    dtype: Any
    arrays: Mapping[str, Any]


@singledispatch
def start(term: Spec, sizes: CacheSizes) -> Any:
    """The state of a term before the first token.

    Raises:
      NotImplementedError: the term has no cache.
    """
    del sizes
    raise NotImplementedError(
        f"decoding {term!r}: its outputs need more of earlier tokens than a cache "
        "keeps; call attention on the whole sequence"
    )


@start.register(IndexMap)
@start.register(Softmax)
@start.register(Latent)
@start.register(LocalLinear)
@start.register(Over)
def _(term: Spec, sizes: CacheSizes) -> None:
    """Nothing beside the keys."""
    del term, sizes


@start.register
def _(term: Weighted, sizes: CacheSizes) -> Any:
    return start(term.term, sizes)


@start.register
def _(term: Mixture, sizes: CacheSizes) -> tuple:
    return tuple(start(part, sizes) for part in term.terms)


@start.register
def _(term: Heads, sizes: CacheSizes) -> tuple:
    """The states of the parts, each for its own heads."""
    group = sizes.num_heads // sizes.num_kv_heads
    return tuple(
        start(
            part,
            replace(
                sizes,
                num_heads=count,
                num_kv_heads=count // group,
                num_v_heads=count // group,
            ),
        )
        for part, count in term.shares
    )


@start.register
def _(term: Recurrent, sizes: CacheSizes) -> LinearState:
    """The state of a recurrence; its size does not grow with tokens."""
    if not term.kind.causal:
        raise ValueError(
            f"decoding {term!r}: it is not causal, so later tokens would change the "
            "outputs of earlier ones: use map=causal(), or causal() & segments()"
        )
    like = partial(jax.ShapeDtypeStruct, dtype=sizes.dtype)
    batch, keys = sizes.batch, term.steps
    inputs = (
        like((batch, 1, sizes.num_heads, sizes.head_dim)),
        like((batch, keys, sizes.num_kv_heads, sizes.head_dim)),
        like((batch, keys, sizes.num_v_heads, sizes.head_dim_v)),
    )
    functions = {n: x for n, x in sizes.arrays.items() if callable(x)}
    arrays = {
        name: _one_token(term, name, axes, sizes)
        for name, axes in term.operands.items()
        if name not in functions
    }

    def after(inputs: Any, arrays: Any) -> Any:
        given = read_by(term, {**functions, **arrays})
        setting = Setting(1.0, return_state=True)
        return attend(term, inputs, given, setting).state

    s = jax.eval_shape(after, inputs, arrays).s
    return empty_state(term, *s.shape)


def _one_token(
    term: Recurrent, name: str, axes: int, sizes: CacheSizes
) -> jax.ShapeDtypeStruct:
    """The shape of an operand for one token; that of the caller, if there is one."""
    if name in sizes.arrays:
        known = sizes.arrays[name]
        shape = list(known.shape)
        by_token = name not in term.of_call and len(shape) > axes
        if by_token:
            shape[1] = term.steps if name in term.of_keys else 1
        return jax.ShapeDtypeStruct(tuple(shape), known.dtype)
    count = term.steps if name in term.of_keys else 1
    if axes == 1:
        return jax.ShapeDtypeStruct((sizes.batch, count), jnp.int32)
    rest = (sizes.num_kv_heads, sizes.head_dim)[: axes - 1]
    lead = () if name in term.of_call else (sizes.batch, count)
    return jax.ShapeDtypeStruct((*lead, *rest), sizes.dtype)


@advance.register
def _(term: Recurrent, state: Any, new: NewTokens) -> tuple[Outcome, Any]:
    """The recurrence goes on from its state.

    Raises:
      NotImplementedError: some tokens of the call do not exist.
    """
    if not isinstance(new.valid, int):
        raise NotImplementedError(
            f"lengths with {term!r}: its state would hold tokens that do not exist: "
            "pass prompts of one length, or one after another"
        )
    setting = replace(new.setting, return_state=True)
    found = attend(term, new.inputs, {**new.of(term), STATE: state}, setting)
    return Outcome(found.out, found.lse), found.state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EntryStore:
    """Entries that were made of whole windows of tokens, and the last tokens.

    Attributes:
      entries: keys and values, ``[batch, entries, heads, dim]``.
      tail: the keys and values of the last ``length - 1`` tokens.
    """

    entries: tuple[Array, Array]
    tail: tuple[Array, Array]


@start.register
def _(term: Compressed, sizes: CacheSizes) -> EntryStore:
    """Entries, and the tokens of a window that is not whole yet."""
    if not term.causal:
        raise ValueError(
            f"decoding {term!r}: queries see blocks of later tokens: use causal=True"
        )
    dims = sizes.head_dim, sizes.head_dim_v

    def of(length: int) -> tuple[Array, Array]:
        k, v = (
            jnp.zeros((sizes.batch, length, sizes.num_kv_heads, d), sizes.dtype)
            for d in dims
        )
        return k, v

    return EntryStore(of(term.num_blocks(sizes.max_len)), of(term.length - 1))


@advance.register
def _(
    term: Compressed, state: EntryStore, new: NewTokens
) -> tuple[Outcome, EntryStore]:
    q, *both = new.inputs
    made = tuple(
        _with_entries(old, tail, x, term, name, new)
        for old, tail, x, name in zip(
            state.entries, state.tail, both, (term.key, term.value), strict=True
        )
    )
    (keys, k_tail), (values, v_tail) = made
    seen = traced_offset.moved_map(term.blocks, {})
    given = read_by(seen, {**new.given, OFFSET: new.count})
    found = over_entries(seen, (q, keys, values), given, new.setting)
    return found, EntryStore((keys, values), (k_tail, v_tail))


def _with_entries(
    entries: Array, tail: Array, x: Array, term: Compressed, name: str | None,
    new: NewTokens,
) -> tuple[Array, Array]:  # fmt: skip
    """The entries with those whose last token is new, and the last tokens after."""
    batch, size = x.shape[:2]
    joined = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    count = jnp.broadcast_to(new.count, (batch,))
    valid = jnp.broadcast_to(jnp.asarray(new.valid, jnp.int32), (batch,))

    def of_entry(old: Array, row: Array, count: Array, valid: Array) -> Any:
        first = jnp.maximum((count - term.length) // term.stride + 1, 0)
        number = first + jnp.arange(-(-size // term.stride), dtype=jnp.int32)
        begin = number * term.stride - count + term.length - 1
        whole = number * term.stride + term.length <= count + valid
        place = begin[:, None] + jnp.arange(term.length, dtype=jnp.int32)[None]
        windows = jnp.take(row, place, axis=0, mode="clip")
        at = jnp.where(whole, number, len(old))
        last = jax.lax.dynamic_slice_in_dim(row, valid, term.length - 1)
        return windows, at, last

    windows, at, last = jax.vmap(of_entry)(entries, joined, count, valid)
    if not entries.shape[1]:
        return entries, last
    made = pooled(windows, term, name, new.given)
    put = jax.vmap(lambda old, at, x: old.at[at].set(x, mode="drop"))
    return put(entries, at, made), last
