"""Selects keys that have the same hash as the query (locality-sensitive hashing).

Angular buckets follow Andoni et al. (Practical and optimal LSH for angular distance,
2015) as Reformer uses them (Kitaev et al., 2020, section 2); buckets by signs follow
Charikar (Similarity estimation techniques from rounding algorithms, 2002, section 3),
numbered by a Gray code, as in HyperAttention (Han et al., 2023, section 3.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32
from typing_extensions import override

from sadsl.maps.base import at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection

KINDS = ("angular", "signs")
ALONE = (None, "causal", "full")
# The number of vectors that are projected at a time.
ROWS = 256
# The buckets of queries and keys whose products are not finite: they match nothing.
NO_QUERY, NO_KEY = -1, -2


@dataclass(frozen=True, repr=False)
class SortedChunks:
    """Chunks of positions sorted by bucket; made by ``sorted_chunks``."""

    size: int
    before: int = 1
    across: bool = False

    def __post_init__(self) -> None:
        at_least("sorted_chunks", "size", self.size, 1)
        at_least("sorted_chunks", "before", self.before, 0)

    def __repr__(self) -> str:
        return call_text(self, by_position=3)


@dataclass(frozen=True, repr=False)
class Lsh(NamedSelection):
    """A query sees the keys of its bucket in a round; made by ``lsh``."""

    buckets: int
    rounds: int = 1
    kind: str = "angular"
    share: bool = False
    alone: str | None = None
    chunks: SortedChunks | None = None
    projections: str = "projections"

    def __post_init__(self) -> None:
        at_least("lsh", "buckets", self.buckets, 2)
        at_least("lsh", "rounds", self.rounds, 1)
        if self.kind not in KINDS:
            raise ValueError(f"lsh: kind={self.kind!r} must be one of {KINDS}")
        if self.alone not in ALONE:
            raise ValueError(f"lsh: alone={self.alone!r} must be one of {ALONE}")
        if self.kind == "angular" and self.buckets % 2:
            raise ValueError(
                f"lsh: buckets={self.buckets} must be even for kind='angular', which "
                "has a bucket for each direction and one for its opposite"
            )
        if self.kind == "signs" and self.buckets & (self.buckets - 1):
            raise ValueError(
                f"lsh: buckets={self.buckets} must be a power of two for "
                "kind='signs': a bucket is a tuple of signs"
            )
        if self.alone and not self.share:
            raise ValueError(
                f"lsh: alone={self.alone!r} needs queries and keys of the same tokens: "
                "pass share=True as well, or alone=None"
            )

    @property
    def columns(self) -> int:
        """The number of random directions in a round."""
        if self.kind == "angular":
            return self.buckets // 2
        return self.buckets.bit_length() - 1

    @property
    def leak(self) -> Leak:  # type: ignore[override]
        """A bucket depends on one token; a place in the sorted order on all of them."""
        return "all" if self.chunks or self.alone == "full" else "none"

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {self.projections: 4}

    @property
    @override
    def order(self) -> Mapping[str, str]:
        if self.rounds > 1:
            return {}
        what = "bucket" if self.chunks is None else "chunk"
        return {"q": f"q_{what}0", "k": f"k_{what}0"}

    @property
    @override
    def by_token(self) -> bool:
        return self.leak == "none"

    @override
    def choose_after(
        self, content: Content, earlier: Mapping[str, Array], there: Array
    ) -> Mapping[str, Array]:
        parts = dict(self.choose(content))
        if self.alone and there.shape[1]:
            # The buckets of queries and of keys are the same.
            again = [
                _is_in(parts[f"q_bucket{r}"], earlier[f"k_bucket{r}"], there)
                for r in range(self.rounds)
            ]
            parts["alone"] &= ~reduce(or_, again)
        return parts

    def draw(
        self, key: Array, num_heads: int, head_dim: int
    ) -> Float[Array, "heads rounds head_dim columns"]:
        """Draws Gaussian directions for the operand ``projections``."""
        shape = num_heads, self.rounds, head_dim, self.columns
        return jax.random.normal(key, shape)

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        query, key = self._buckets(content)
        parts: dict[str, Array] = {}
        for r in range(self.rounds):
            q, k = query[:, :, r], key[:, :, r]
            if self.chunks is not None:
                found = chunk_of(q, k, self.chunks.size)
                parts |= {f"q_chunk{r}": found[0], f"k_chunk{r}": found[1]}
            if self.chunks is None or not self.chunks.across:
                parts[f"q_bucket{r}"] = jnp.where(q < 0, NO_QUERY, q)
                parts[f"k_bucket{r}"] = jnp.where(k < 0, NO_KEY, k)
        if self.alone:
            rounds = [
                _sees_another(query[:, :, r], self.chunks, self.alone == "causal")
                for r in range(self.rounds)
            ]
            parts["alone"] = ~reduce(or_, rounds) & (query >= 0).any(axis=2)
        return parts

    def _buckets(self, content: Content) -> tuple[Array, Array]:
        """The buckets of queries and of keys, ``[batch, heads, rounds, seq]``."""
        projections = self._projections(content)
        query = hashes(content.queries(), projections, self.kind)
        if not self.share:
            return query, hashes(content.keys(), projections, self.kind)
        lengths = content.q.shape[2], content.k.shape[2]
        if lengths[0] != lengths[1] or content.q_offset:
            raise ValueError(
                f"lsh: share=True needs a key for every query, not {lengths[0]} "
                f"queries from position {content.q_offset} on and {lengths[1]} keys: "
                "pass share=False to hash queries and keys separately"
            )
        return query, query

    def _projections(self, content: Content) -> Array:
        """The random directions, checked, float32."""
        heads, head_dim = content.q.shape[1], content.q.shape[3]
        rest = (self.rounds, head_dim, self.columns)
        what = f"the directions of {self!r}, floats {[heads, *rest]}"
        found = content.operand(self.projections, what)
        if found.shape[2:] != rest or found.shape[1] not in (1, heads):
            raise ValueError(
                f"operand {self.projections!r} has shape {found.shape[1:]} without its "
                f"batch axis: {self!r} needs [heads, rounds, head_dim, columns] = "
                f"{(heads, *rest)}, or one head for all; its method `draw` makes them"
            )
        return found.astype(jnp.float32)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        found = reduce(or_, [self._round(r, q, k, h) for r in range(self.rounds)])
        if self.alone is None:
            return found
        return (found & (q != k)) | ((self.part("alone")[h, q] == 1) & (q == k))

    def _round(self, r: int, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        """Whether ``q`` sees ``k`` in round ``r``."""
        same = self.part(f"q_bucket{r}")[h, q] == self.part(f"k_bucket{r}")[h, k]
        if self.chunks is None:
            return same
        own, other = self.part(f"q_chunk{r}")[h, q], self.part(f"k_chunk{r}")[h, k]
        near = own == other
        if self.chunks.before:
            near = (other <= own) & (own <= other + self.chunks.before)
        return near if self.chunks.across else near & same


def lsh(
    buckets: int,
    rounds: int = 1,
    *,
    kind: str = "angular",
    share: bool = False,
    alone: str | None = None,
    chunks: SortedChunks | None = None,
    projections: str = "projections",
) -> Lsh:
    """A query sees the keys that have its bucket in at least one round of hashing.

    Kitaev et al., Reformer, 2020, section 2. There is one softmax over the union of the
    rounds: a key that several rounds find counts once, which the paper reaches by a
    correction for the number of rounds. The random directions are an operand, floats
    ``[num_q_heads or 1, rounds, head_dim, columns]``; the method ``draw`` makes them.
    The choice has no form as lists: without ``chunks`` a bucket may hold every key.

    Args:
      buckets: the number of buckets. With "angular", it is even, and the bucket of a
        vector is the nearest of ``buckets / 2`` directions and their opposites. With
        "signs", it is a power of two, and a bucket is a tuple of signs, numbered by its
        rank in the Gray code.
      rounds: the number of independent hashes.
      kind: "angular" or "signs".
      share: use the buckets of the queries for the keys, too.
      alone: None: a token sees itself like any other key. Else it sees itself only if
        it sees no other token: with "causal" no earlier one, with "full" none at all.
      chunks: ``sorted_chunks(...)`` to cut buckets into pieces of one size.
      projections: the name of the operand.

    Raises:
      ValueError: the arguments do not fit together; in a call, the directions are
        missing or of another shape, or ``share`` finds other lengths of q and k.

    Example:
      >>> import sadsl as sa
      >>> spec = sa.lsh(4, share=True)
      >>> buckets = {spec.key(f"{side}_bucket0"): [[3, 1, 3]] for side in ("q", "k")}
      >>> print(spec.dense(3, operands=buckets)[0].astype(int))
      [[1 0 1]
       [0 1 0]
       [1 0 1]]
    """
    return Lsh(buckets, rounds, kind, share, alone, chunks, projections)


def sorted_chunks(size: int, before: int = 1, across: bool = False) -> SortedChunks:
    """Chunks for ``lsh``: keys are sorted by bucket, then by position, and cut.

    Queries are sorted and cut too, into chunks of ``size * q_seq_len / kv_seq_len``,
    rounded up. The last chunk may be short. The first chunk has none before it, while
    in Reformer's code it sees the last one.

    Args:
      size: the number of keys in a chunk.
      before: how many chunks before its own a query sees.
      across: let a query see all keys of these chunks; if False, those of its bucket.

    Raises:
      ValueError: a size is too small.

    Example:
      >>> import sadsl as sa
      >>> sa.lsh(64, share=True, chunks=sorted_chunks(32))
      lsh(64, share=True, chunks=sorted_chunks(32))
    """
    return SortedChunks(size, before, across)


def hashes(
    x: Float[Array, "batch heads seq head_dim"],
    projections: Float[Array, "batch_or_1 heads_or_1 rounds head_dim columns"],
    kind: str,
) -> Int32[Array, "batch heads rounds seq"]:
    """The bucket of each vector, -1 where its products are not finite.

    Some vectors are projected at a time, so that the products take little memory.
    """
    batch, heads, length, head_dim = x.shape
    steps = -(-length // ROWS)
    if steps == 1:
        return _hashes(x, projections, kind)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, steps * ROWS - length), (0, 0)])
    parts = jnp.moveaxis(x.reshape(batch, heads, steps, ROWS, head_dim), 2, 0)
    found = jax.lax.map(lambda part: _hashes(part, projections, kind), parts)
    found = jnp.moveaxis(found, 0, 3)
    return found.reshape(*found.shape[:3], steps * ROWS)[..., :length]


def _hashes(x: Array, projections: Array, kind: str) -> Array:
    y = jnp.matmul(x[:, :, None], projections, precision="highest")
    if kind == "angular":
        # The argmax of [y, -y], without making the array; ties go to the first.
        nearest, farthest = jnp.argmax(y, axis=-1), jnp.argmin(y, axis=-1)
        is_near = y.max(axis=-1) >= -y.min(axis=-1)
        found = jnp.where(is_near, nearest, farthest + y.shape[-1]).astype(jnp.int32)
    else:
        place = jnp.left_shift(1, jnp.arange(y.shape[-1], dtype=jnp.int32))
        found = jnp.where(y > 0, place.reshape(1, 1, 1, 1, -1), 0)
        found = jnp.sum(found, axis=-1, dtype=jnp.int32)
        found = gray_rank(found, y.shape[-1])
    return jnp.where(jnp.isfinite(y).all(axis=-1), found, -1)


def gray_rank(code: Int32[Array, "..."], bits: int) -> Int32[Array, "..."]:
    """The rank of a word of bits in the Gray code; neighbours differ in one bit."""
    shift = 1
    while shift < bits:
        code = code ^ (code >> shift)
        shift *= 2
    return code


def by_bucket(bucket: Int32[Array, "*lead seq"]) -> Int32[Array, "*lead seq"]:
    """Positions sorted by bucket, then by position; those without a bucket are last."""
    last = jnp.where(bucket < 0, jnp.iinfo(jnp.int32).max, bucket)
    return jnp.argsort(last, axis=-1, stable=True).astype(jnp.int32)


def chunk_of(
    q_bucket: Int32[Array, "*lead q"], k_bucket: Int32[Array, "*lead kv"], size: int
) -> tuple[Int32[Array, "*lead q"], Int32[Array, "*lead kv"]]:
    """The chunk of each query and of each key.

    Without a bucket, it is -1 for a query, and a number past the last for a key.
    """
    q_seq_len, kv_seq_len = q_bucket.shape[-1], k_bucket.shape[-1]
    q_size = -(-size * q_seq_len // kv_seq_len)
    q, k = (
        jnp.argsort(by_bucket(x), axis=-1).astype(jnp.int32) // width
        for x, width in ((q_bucket, q_size), (k_bucket, size))
    )
    beyond = max(q_seq_len // q_size, kv_seq_len // size) + 1
    return jnp.where(q_bucket < 0, -1, q), jnp.where(k_bucket < 0, beyond, k)


def _is_in(
    query: Int[Array, "batch heads q"],
    earlier: Int[Array, "batch heads slots"],
    there: Bool[Array, "batch_or_1 slots"],
) -> Bool[Array, "batch heads q"]:
    """Whether an earlier key has the bucket of a query."""
    same = query[:, :, :, None] == earlier[:, :, None]
    return (same & there[:, None, None]).any(axis=3)


def _sees_another(
    bucket: Int32[Array, "batch heads seq"], chunks: SortedChunks | None, causal: bool
) -> Bool[Array, "batch heads seq"]:
    """Whether a token sees some other token, or some earlier one if ``causal``."""
    order = by_bucket(bucket)
    rank = jnp.argsort(order, axis=-1)
    if chunks is not None and chunks.across:
        found = _others_in_chunks(order, bucket, chunks, causal)
        return jnp.take_along_axis(found, rank, axis=-1)
    ordered = jnp.take_along_axis(bucket, order, axis=-1)
    # Within a bucket, tokens are sorted by position: the entry before is the nearest
    # earlier one.
    same = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    place = jnp.arange(1, ordered.shape[-1], dtype=jnp.int32)
    cut = place < 0 if chunks is None else place % chunks.size == 0
    cut = jnp.broadcast_to(cut, same.shape)
    seen_before = same if chunks is None or chunks.before else same & ~cut
    none = jnp.zeros_like(ordered[..., :1], dtype=bool)
    found = jnp.concatenate([none, seen_before], axis=-1)
    if not causal:
        found |= jnp.concatenate([same & ~cut, none], axis=-1)
    return jnp.take_along_axis(found, rank, axis=-1)


def _others_in_chunks(
    order: Int32[Array, "batch heads seq"],
    bucket: Int32[Array, "batch heads seq"],
    chunks: SortedChunks,
    causal: bool,
) -> Bool[Array, "batch heads seq"]:
    """``_sees_another`` of the sorted tokens, where a token sees whole chunks."""
    length = order.shape[-1]
    real = jnp.take_along_axis(bucket, order, axis=-1) >= 0
    spare = [(0, 0), (0, 0), (0, -length % chunks.size)]

    def each(x: Array, neutral: int) -> Array:
        x = jnp.pad(jnp.where(real, x, neutral), spare, constant_values=neutral)
        return x.reshape(*x.shape[:2], -1, chunks.size)

    first = each(order, length).min(axis=-1)
    count = each(jnp.ones_like(order), 0).sum(axis=-1, dtype=jnp.int32)
    earliest, total = first, count
    for _ in range(min(chunks.before, first.shape[-1] - 1)):
        before = jnp.pad(earliest, [(0, 0), (0, 0), (1, 0)], constant_values=length)
        earliest = jnp.minimum(first, before[..., :-1])
        total = count + jnp.pad(total, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    spread = [jnp.repeat(x, chunks.size, axis=-1) for x in (earliest, total)]
    earliest, total = (x[..., :length] for x in spread)
    return real & (earliest < order if causal else total > 1)
