"""Selects the columns and slashes to which the last queries attend most.

A column is a key, a slash is an offset ``q - k``. The exact attention of a few queries
says which columns and slashes all queries see.
Jiang et al., MInference 1.0, 2024, section 3; Lai et al., FlexPrefill, 2025.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Integer
from typing_extensions import override

from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth, maximum
from sadsl.selections import ranking
from sadsl.selections.base import Content, Leak, NamedSelection

MODALITY = "the integers [batch or 1, length] that name the modality of every position"


class LineMass(NamedTuple):
    """The attention that the last queries give to each column and each slash.

    It is ``-inf`` for a column or a slash that none of them sees with a finite logit.
    """

    columns: Float32[Array, "... keys"]
    slashes: Float32[Array, "... offsets"]


def shared_mass(
    q: Float32[Array, "*lead rows head_dim"],
    k: Float32[Array, "*lead keys head_dim"],
    last: int | Integer[Array, ""],
    rows: Bool[Array, " rows"],
    keys: Bool[Array, " keys"],
    num_offsets: int,
) -> LineMass:
    """The mean causal softmax of some rows, summed by column and by slash.

    Row ``i`` of ``q``, already scaled, is at position ``last - (len(q) - 1) + i``. Only
    those in ``rows`` count. The softmax is over all keys, but the sums are over
    ``keys`` only. Logits of NaN or infinity are left out. Memory: rows times keys.
    """
    num_rows, num_keys = q.shape[-2], k.shape[-2]
    position = last - (num_rows - 1) + jnp.arange(num_rows)
    logits = jnp.einsum("...qd,...kd->...qk", q, k)
    causal = jnp.arange(num_keys)[None, :] <= position[:, None]
    sees = jnp.broadcast_to(causal & rows[:, None], logits.shape)
    held = jnp.isfinite(logits) & sees
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf, where=held)
    weight = jnp.where(held, jnp.exp(logits - jnp.where(held, top, logits)), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    count = jnp.maximum(jnp.sum(rows), 1).astype(jnp.float32)
    weight = weight / (jnp.where(total > 0, total, 1.0) * count)
    keys = jnp.broadcast_to(keys, held.shape)
    weight, held = jnp.where(keys, weight, 0.0), held & keys
    columns = jnp.where(held.any(axis=-2), weight.sum(axis=-2), -jnp.inf)

    def by_offset(x: Array) -> Array:
        # Along an anti-diagonal of the reversed rows, key + (last - row) is constant.
        skewed = _skew(jnp.flip(x, axis=-2)).sum(axis=-2)
        at = last - jnp.arange(num_offsets)
        found = skewed[..., jnp.clip(at, 0, skewed.shape[-1] - 1)]
        inside = (at >= 0) & (at < skewed.shape[-1])
        return jnp.where(jnp.broadcast_to(inside, found.shape), found, 0.0)

    seen = by_offset(held.astype(jnp.float32)) > 0
    return LineMass(columns, jnp.where(seen, by_offset(weight), -jnp.inf))


def _skew(x: Array) -> Array:
    """``y[..., r, c] = x[..., r, c - r]``, 0 outside, by a reshape."""
    *lead, rows, width = x.shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows)])
    flat = x.reshape(*lead, rows * (width + rows))[..., : rows * (width + rows - 1)]
    return flat.reshape(*lead, rows, width + rows - 1)


def best(
    scores: Float[Array, "... n"],
    count: int | Integer[Array, "..."],
    forced: Bool[Array, "..."] | None = None,
) -> Bool[Array, "... n"]:
    """The ``count`` greatest scores of each row; ties go to the lower index.

    ``count`` is a number, or one for each row. The ``forced`` entries are taken first,
    whatever their scores, and count; others of NaN or infinity are never taken.
    """
    competing = jnp.isfinite(scores)
    count = jnp.broadcast_to(jnp.asarray(count), scores.shape[:-1])
    scores = scores.astype(jnp.float32)
    if forced is None:
        return ranking.top(scores, competing, count)
    forced = jnp.broadcast_to(forced, scores.shape)
    place = jnp.cumsum(forced, axis=-1)
    taken = forced & (place <= jnp.broadcast_to(count[..., None], place.shape))
    left = count - taken.sum(axis=-1, dtype=jnp.int32)
    return taken | ranking.top(scores, competing & ~forced, left)


def covering(
    mass: Float[Array, "... n"], share: float, least: int
) -> Integer[Array, "..."]:
    """How many of the greatest masses to take: one more than add up to ``share``.

    It is at least ``least`` and at most all. Rows need not add up to 1.
    """
    finite = jnp.where(jnp.isfinite(mass), mass.astype(jnp.float32), 0.0)
    within = jnp.cumsum(-jnp.sort(-finite, axis=-1), axis=-1) <= share
    return jnp.clip(within.sum(axis=-1) + 1, min(least, mass.shape[-1]), mass.shape[-1])


@dataclass(frozen=True, repr=False)
class _Estimated(NamedSelection):
    """Columns and slashes that are chosen by the attention of the last queries."""

    leak: ClassVar[Leak] = "all"

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        column = self.part("columns")[h, k] == 1
        slash = self.part("slashes")[h, maximum(q - k, 0)] == 1
        return (k <= q) & (column | slash)


@dataclass(frozen=True, repr=False)
class VerticalSlash(_Estimated):
    """A fixed number of columns and slashes; made by ``vertical_slash``."""

    vertical: int
    slash: int
    last: int = 64
    forced_columns: int = 30
    forced_slashes: int = 100
    queries: int | None = None
    keys: int | None = None

    def __post_init__(self) -> None:
        for name in ("vertical", "slash", "forced_columns", "forced_slashes"):
            at_least("vertical_slash", name, getattr(self, name), 0)
        at_least("vertical_slash", "last", self.last, 1)
        for name in ("queries", "keys"):
            if getattr(self, name) is not None:
                at_least("vertical_slash", name, getattr(self, name), 0)

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        by_modality = self.queries is not None or self.keys is not None
        return {"modality": 1} if by_modality else {}

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Chooses bools ``columns [batch, heads, keys]``, and ``slashes`` by offset."""
        end = content.q_offset + content.q.shape[2]
        label = None
        if self.operands:
            label = labels(content, least=max(end, content.k.shape[2]))
        rows = EstimatingRows(self.last, self.queries, self.keys)
        mass, keys = _estimate(rows, content, label)
        rank = jnp.cumsum(keys, axis=-1) - 1
        front = (keys & (rank < self.forced_columns))[:, None]
        near = jnp.arange(mass.slashes.shape[-1]) < self.forced_slashes
        return {
            "columns": best(mass.columns, self.vertical, front),
            "slashes": best(mass.slashes, self.slash, near),
        }


class EstimatingRows(NamedTuple):
    """The queries whose attention is computed, and the keys that compete.

    They are the ``last`` queries (of a modality) and all keys (or those of one).
    """

    last: int
    queries: int | None = None
    keys: int | None = None


def _estimate(
    rows: EstimatingRows, content: Content, label: Array | None = None
) -> tuple[LineMass, Array]:
    """The mass of the last rows, and which keys compete, ``[batch or 1, keys]``."""
    q, k = content.queries() * content.sm_scale, content.keys()
    offset, num_queries, num_keys = content.q_offset, q.shape[2], k.shape[2]
    num_rows = min(rows.last, num_queries)
    end = offset + num_queries
    if label is None:
        every, keys = jnp.ones(num_rows, bool), jnp.ones(num_keys, bool)
        tail = q[:, :, num_queries - num_rows :]
        return shared_mass(tail, k, end - 1, every, keys, end), keys[None]

    def of_entry(q: Array, k: Array, label: Array) -> tuple[LineMass, Array]:
        keys = jnp.ones(num_keys, bool)
        if rows.keys is not None:
            keys = label[:num_keys] == rows.keys
        mine = jnp.ones(num_queries, bool)
        if rows.queries is not None:
            mine = label[offset:end] == rows.queries
        place = jnp.arange(num_queries)
        last = jnp.max(jnp.where(mine, place, -1))
        # The last span starts after the query before it that has another modality.
        before = jnp.max(jnp.where(~mine & (place < last), place, -1))
        at = last - (num_rows - 1) + jnp.arange(num_rows)
        span = (at > before) & (at >= 0)
        tail = q[:, jnp.maximum(at, 0)]
        return shared_mass(tail, k, offset + last, span, keys, end), keys

    label = jnp.broadcast_to(label, (q.shape[0], label.shape[-1]))
    return jax.vmap(of_entry)(q, k, label)


def labels(content: Content, least: int) -> Integer[Array, "batch length"]:
    """The operand ``modality``, integers for at least ``least`` positions.

    Raises:
      ValueError: it is missing, not of integers or too short.
    """
    found = content.operand("modality", MODALITY)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"operand 'modality' has dtype {found.dtype}: pass {MODALITY}")
    if found.shape[-1] < least:
        raise ValueError(
            f"operand 'modality' has {found.shape[-1]} entries, but queries and keys "
            f"take {least} positions: pass {MODALITY}"
        )
    return found


@dataclass(frozen=True, repr=False)
class VerticalSlashMass(_Estimated):
    """A share of the attention; made by ``vertical_slash_mass``."""

    mass: float
    last: int = 512
    least: int = 512
    forced_columns: int = 4
    forced_slashes: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.mass <= 1:
            raise ValueError(
                f"vertical_slash_mass: mass={self.mass} is a share of the attention: "
                "give a number from 0 to 1"
            )
        at_least("vertical_slash_mass", "last", self.last, 1)
        for name in ("least", "forced_columns", "forced_slashes"):
            at_least("vertical_slash_mass", name, getattr(self, name), 0)

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Chooses bools ``columns [batch, heads, keys]``, and ``slashes`` by offset."""
        mass, _ = _estimate(EstimatingRows(self.last), content)

        def enough(x: Array, forced: int) -> Array:
            count = covering(x, self.mass, self.least)
            return best(x, count, jnp.arange(x.shape[-1]) < forced)

        return {
            "columns": enough(mass.columns, self.forced_columns),
            "slashes": enough(mass.slashes, self.forced_slashes),
        }


def vertical_slash(
    vertical: int,
    slash: int,
    *,
    last: int = 64,
    forced_columns: int = 30,
    forced_slashes: int = 100,
    queries: int | None = None,
    keys: int | None = None,
) -> VerticalSlash:
    """A query sees some keys of the past (columns) and some offsets to it (slashes).

    Jiang et al., MInference 1.0, 2024, section 3. Each head keeps the columns and the
    slashes that have the greatest mass in the causal softmax of the last queries, so
    the choice depends on later tokens. Ties go to the lower index.

    Args:
      vertical: the number of columns.
      slash: the number of slashes.
      last: how many of the last queries are evaluated.
      forced_columns: how many of the first keys are always kept; they count.
      forced_slashes: how many of the nearest offsets are always kept; they count.
      queries: a modality: the rows are the last ones of its last span (Li et al.,
        MMInference, 2025). The operand ``modality``, integers ``[length]``, then gives
        the modality of each position.
      keys: a modality: only its keys compete as columns.

    Raises:
      ValueError: a size is too small; in a call, ``modality`` is missing or not valid.

    Example:
      >>> from sadsl.selections import vertical_slash
      >>> spec = vertical_slash(1, 2)
      >>> parts = {"columns": [[0, 1, 0, 0]], "slashes": [[1, 0, 0, 1]]}  # [heads, ...]
      >>> operands = {spec.key(name): part for name, part in parts.items()}
      >>> print(spec.dense(4, operands=operands)[0].astype(int))
      [[1 0 0 0]
       [0 1 0 0]
       [0 1 1 0]
       [1 1 0 1]]
    """
    return VerticalSlash(
        vertical, slash, last, forced_columns, forced_slashes, queries, keys
    )


def vertical_slash_mass(
    mass: float,
    *,
    last: int = 512,
    least: int = 512,
    forced_columns: int = 4,
    forced_slashes: int = 64,
) -> VerticalSlashMass:
    """``vertical_slash`` whose numbers of columns and slashes each head finds itself.

    Lai et al., FlexPrefill, 2025, in the form of Nawrot et al., The sparse frontier,
    2025. The number of columns, and that of slashes, is one more than the greatest
    number of them that together hold at most the share ``mass`` of the attention.

    Args:
      mass: the share of the attention of the last queries, from 0 to 1.
      last: how many of the last queries are evaluated.
      least: the least number of columns and of slashes.
      forced_columns: how many of the first keys are always kept; they count.
      forced_slashes: how many of the nearest offsets are always kept; they count.

    Raises:
      ValueError: ``mass`` is not from 0 to 1, or a size is too small.

    Example:
      >>> import sadsl as sa
      >>> from sadsl.selections import vertical_slash_mass
      >>> sa.sinks(4) & vertical_slash_mass(0.95, least=64)
      sinks(4) & vertical_slash_mass(0.95, least=64)
    """
    return VerticalSlashMass(mass, last, least, forced_columns, forced_slashes)
