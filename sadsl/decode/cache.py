"""``DecodingCache``, ``init_cache``: what a spec keeps of earlier tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lowering import ir
from lowering.problem import Problem
from sadsl.decode.choices import token_parts
from sadsl.decode.keys import K, KeyStore, V, empty
from sadsl.decode.layout import (
    CacheLayout,
    by_key,
    ranks_of,
    reads_in_order,
    slots_of,
    token_maps,
    weights_of,
)
from sadsl.decode.pages import Paging, paging_of
from sadsl.decode.slots import CacheSlots
from sadsl.decode.states import CacheSizes, start
from sadsl.maps.base import IndexMap, at_least
from sadsl.selections.base import selections_of
from sadsl.terms.base import Spec, Term
from sadsl.terms.heads import Heads
from sadsl.terms.latent import Latent
from sadsl.terms.mixtures import Joint, Mixture, Weighted, members_of
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodingCache:
    """What a spec keeps of the tokens so far; a pytree, made by ``init_cache``.

    Attributes:
      length: the number of tokens so far: int32, a scalar, or ``[batch]`` if the cache
        is ragged.
      keys: keys and values by slot; None if no part of the spec keeps keys.
      states: recurrent states and pooled entries, by the parts of the spec.
      layout: which slots there are, and what else is static.
    """

    length: Int[Array, "..."]
    keys: KeyStore | None
    states: Any
    layout: CacheLayout = field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def axes(self) -> dict[str, int]:
        """The axis of the slots in each array of ``keys``."""
        return {K: 2, V: 2} | {name: axis + 1 for name, axis in self.layout.axes}

    def __str__(self) -> str:
        slots = self.layout.slots
        parts = [f"{self.layout.term!r}: up to {self.layout.max_len:,} tokens"]
        if slots is not None:
            held = f"the first {slots.pinned:,} for good and a ring of {slots.ring:,}"
            parts.append("all keys" if slots.hold_all else held)
        if self.keys is not None and self.keys.pages is not None:
            pages = self.keys.pages
            parts.append(f"{len(pages.free):,} pages of {pages.size:,}")
        return ", ".join((*parts, f"{self.nbytes:,} bytes"))


def init_cache(
    spec: Spec | str,
    batch: int,
    max_len: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any = jnp.float32,
    *,
    num_heads: int | None = None,
    num_v_heads: int | None = None,
    head_dim_v: int | None = None,
    operands: Mapping[str, Any] | None = None,
    ragged: bool = False,
    page_size: int | None = None,
    num_pages: int | None = None,
) -> DecodingCache:
    """The cache of a spec before the first token; its layout follows from the maps.

    Where the expression proves that only some keys are seen again, as for
    ``causal() & (window(512) | sinks(4))``, the cache has that many slots (see
    ``sadsl.cache``): the first keys for good, and a ring. Else it has ``max_len``, or
    pages. ``linear`` and ``delta`` keep a state, ``compressed`` its blocks and the last
    tokens. Arrays that maps index by the key are kept as keys are, but never in pages.

    Args:
      spec: an index map, a term, or text; causal.
      batch, max_len: sequences, and the most tokens of one.
      num_kv_heads, head_dim, dtype: of the keys.
      num_heads: query heads; ``num_kv_heads`` if None.
      num_v_heads, head_dim_v: of the values; those of the keys if None.
      operands: for arrays of floats with an entry for each key, such as biases and
        index keys: the array of a prompt, or its ``jax.ShapeDtypeStruct``. Decays and
        feature maps too, if their shapes do not follow from the other sizes.
      ragged: whether each sequence has a length of its own.
      page_size: the tokens of a page; a multiple of 128 for "tpu", of 16 for "triton".
        Ignored by states, and by rings of at most half of ``max_len``: they are small.
      num_pages: for all sequences; enough for ``max_len`` of each if None.

    Raises:
      ValueError: the spec is not causal, a size is below 1, or a kept array is missing.
      NotImplementedError: a part of the spec has no cache, or the keys of a query
        depend on how many tokens follow.

    Example:
      >>> import sadsl as sa
      >>> spec = sa.causal() & (sa.window(7) | sa.sinks(2))
      >>> cache = sa.init_cache(spec, batch=1, max_len=100, num_kv_heads=1, head_dim=4)
      >>> cache.keys.k.shape  # [batch, heads, slots, head_dim]
      (1, 1, 10, 4)
    """
    at_least("init_cache", "batch", batch, 1)
    at_least("init_cache", "max_len", max_len, 1)
    sizes = CacheSizes(
        batch, max_len, num_kv_heads if num_heads is None else num_heads, num_kv_heads,
        num_kv_heads if num_v_heads is None else num_v_heads,
        head_dim, head_dim if head_dim_v is None else head_dim_v,
        dtype, dict(operands or {}),
    )  # fmt: skip
    paging = paging_of(page_size, num_pages)
    return _empty_cache(any_term(spec), sizes, paging, ragged=ragged)


def _empty_cache(
    term: Term, sizes: CacheSizes, paging: Paging | None, *, ragged: bool
) -> DecodingCache:
    max_len, heads = sizes.max_len, sizes.num_heads
    maps = tuple(token_maps(term, heads))
    in_order = reads_in_order(term)
    slots = slots_of(maps, max_len, in_order=in_order) if maps else None
    if slots is not None and paging is not None:
        slots, paging = paging.fitted(slots)
    _check_choices(term, sizes.arrays)
    resolved = _resolved(term, Problem(max_len, max_len, heads))
    axes = {} if slots is None else _kept(term, sizes.arrays)
    kept = tuple(sorted(axes.items()))
    layout = CacheLayout(resolved, max_len, heads, slots, kept)
    keys = None
    if slots is not None:
        known = {**sizes.arrays, **_parts(term, sizes)}
        ranks = ranks_of(term)
        arrays = {
            name: _by_slot(name, (axis, ranks[name]), known, slots, sizes.batch)
            for name, axis in axes.items()
        }
        dims = {K: sizes.head_dim}
        if not _shares_values(term):
            dims[V] = sizes.head_dim_v
        pages = None if paging is None else paging.table(sizes.batch, slots)
        shape = sizes.batch, sizes.num_kv_heads, slots.size
        if pages is not None:
            shape = len(pages.free), sizes.num_kv_heads, pages.size
        keys = KeyStore({**empty(shape, dims, sizes.dtype), **arrays}, pages)
    # A NumPy array, so that a call knows that there are no earlier tokens.
    length = np.zeros((sizes.batch,) if ragged else (), np.int32)
    return DecodingCache(cast(Any, length), keys, start(resolved, sizes), layout)


def _check_choices(term: Term, given: Mapping[str, Any]) -> None:
    """Refuses choices that a cache cannot make.

    Raises:
      NotImplementedError: there is one.
    """
    for choice in selections_of(term):
        if any(map(choice.owns, given)):
            continue
        if not (choice.by_token or choice.by_position):
            raise NotImplementedError(
                f"decoding {choice!r}: it chooses for several queries at once, or its "
                "choice depends on the length: choose for each query, with block_q=1; "
                "or choose by sadsl.select, and pass the result as operands= here and "
                "in each call"
            )
        if choice.leak != "none":
            raise NotImplementedError(
                f"decoding {choice!r}: its choice for a query depends on later tokens "
                f"(leak {choice.leak!r}), so no cache can make it; choose for each "
                "query from the keys before it, with block_q=1 and eligible="
            )


def _parts(term: Term, sizes: CacheSizes) -> dict[str, Any]:
    """The shapes of the parts of choices that belong to tokens, for one token."""
    like = jax.ShapeDtypeStruct
    q, k = (
        like((sizes.batch, 1, heads, sizes.head_dim), sizes.dtype)
        for heads in (sizes.num_heads, sizes.num_kv_heads)
    )
    ranks = {n: r for s in selections_of(term) for n, r in s.operands.items()}
    by_key = {n: a for s in selections_of(term) for n, a in s.of_keys.items()}
    arrays = {}
    for name in ranks.keys() & sizes.arrays.keys():
        x = sizes.arrays[name]
        shape = list(jnp.shape(x))
        if name in by_key:
            shape[len(shape) - ranks[name] + by_key[name]] = 1
        arrays[name] = like(tuple(shape), jnp.result_type(x))

    def of(q: Array, k: Array, arrays: Mapping[str, Array]) -> dict[str, Array]:
        nothing = dict.fromkeys((), k)
        there = jnp.zeros((1, 0), bool)
        return token_parts(term, (q, k), arrays, nothing, there)

    return dict(jax.eval_shape(of, q, k, arrays))


def _resolved(term: Spec, problem: Problem) -> Any:
    """The term with the members of each ``joint`` in its place: no two share a pair."""
    match term:
        case Joint():
            members = members_of(term, problem)
            found = (
                Weighted(m.term, m.log_weight) if m.log_weight else m.term
                for m in members
            )
            return Joint(tuple(_resolved(part, problem) for part in found))
        case Weighted(inner, log_weight):
            return Weighted(_resolved(inner, problem), log_weight)
        case Mixture():
            parts = tuple(_resolved(part, problem) for part in term.terms)
            return replace(term, terms=parts)
        case Heads():
            shares = (
                (_resolved(part, replace(problem, num_heads=n)), n)
                for part, n in term.shares
            )
            return Heads(tuple(shares))
    return term


def _kept(term: Term, given: Mapping[str, Any]) -> dict[str, int]:
    """The arrays that are kept as keys are, and the axis of the keys.

    Raises:
      ValueError: the shape of one is not known.
      NotImplementedError: floats are read at the query and at the key.
    """
    found, chosen = by_key(term), selections_of(term)
    floats = {x.name for x in weights_of(term)}
    at_query = {x.name for x in weights_of(term) if ir.Q in x.index and not x.running}
    for name in sorted(at_query & found.keys()):
        raise NotImplementedError(
            f"decoding {term!r}: it reads the floats {name!r} at the query and at the "
            "key: give the two uses different names, and pass the array under both"
        )
    for name, axis in found.items():
        made = any(s.owns(name) for s in chosen)
        if not made and name not in given and (axis or name in floats):
            raise ValueError(
                f"init_cache: {term!r} reads {name!r} at the key, and a cache keeps it "
                f"for later queries: pass operands={{{name!r}: array}}, or its "
                "jax.ShapeDtypeStruct, as for a prompt"
            )
    compared = (s for s in selections_of(term) if not s.by_token)
    of_choices = {n: a for s in compared for n, a in s.of_keys.items()}
    return found | {n: a for n, a in of_choices.items() if n in given}


def _by_slot(
    name: str, place: tuple[int, int], given: Mapping[str, Any], slots: CacheSlots,
    batch: int,
) -> Array:  # fmt: skip
    """An array for each slot, without tokens yet.

    ``place`` has the axis of the keys and the number of axes, without the batch.
    """
    axis, rank = place
    like = given.get(name, jax.ShapeDtypeStruct((batch, 1), jnp.int32))
    if not hasattr(like, "shape"):
        like = np.asarray(like)
    own = like.shape[len(like.shape) - rank :]  # without a batch axis
    shape = [batch, *own]
    shape[axis + 1] = slots.size
    return jnp.zeros(shape, jax.dtypes.canonicalize_dtype(like.dtype))


def _shares_values(term: Any) -> bool:
    """Whether the values of all parts are channels of their keys."""
    match term:
        case Softmax():
            return term.values is not None
        case Latent():
            return True
        case IndexMap():
            return False
    parts = [
        part for part in term.parts if not isinstance(part, Term) or part.of_tokens
    ]
    return bool(parts) and all(map(_shares_values, parts))
