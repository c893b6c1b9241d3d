"""Columns and slashes that the last queries attend to: vertical-slash heads.

A few queries are attended with exactly; what they give to a column (a key) and to a
slash (an offset ``q - k``) says which columns and slashes all queries see.
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
    """What the last queries give to each column and slash, ``[..., keys or offsets]``.

    What none of them sees with a finite logit has ``-inf``.
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
    """The mean over ``rows`` of their causal softmax, summed by column and by slash.

    Row ``i`` of ``q``, already scaled, is at position ``last - (len(q) - 1) + i``; only
    those in ``rows`` count, and only mass on ``keys`` is reported, though the softmax
    is over all. Logits that are NaN or inf count as missing. Memory: rows times keys.
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
    """The ``count`` greatest scores, those ``forced`` first, ties to the lower index.

    ``count`` is a number, or one for each row of scores. Forced ones fill the budget
    and are taken whatever their score; another that is NaN or inf is never taken.
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
    """How many of the greatest masses to take: one more than stay within ``share``.

    At least ``least``, at most all. Rows need not add up to 1.
    """
    finite = jnp.where(jnp.isfinite(mass), mass.astype(jnp.float32), 0.0)
    within = jnp.cumsum(-jnp.sort(-finite, axis=-1), axis=-1) <= share
    return jnp.clip(within.sum(axis=-1) + 1, min(least, mass.shape[-1]), mass.shape[-1])


@dataclass(frozen=True, repr=False)
class _Estimated(NamedSelection):
    """Columns and slashes chosen by the mass that the last queries give to them."""

    leak: ClassVar[Leak] = "all"

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        column = self.part("columns")[h, k] == 1
        slash = self.part("slashes")[h, maximum(q - k, 0)] == 1
        return (k <= q) & (column | slash)


@dataclass(frozen=True, repr=False)
class VerticalSlash(_Estimated):
    """See ``vertical_slash``."""

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
        """Bools, ``columns [batch, heads, keys]`` and ``slashes``, by offset, alike."""
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
    """Which queries estimate, and for which keys: the last ones, of a modality."""

    last: int
    queries: int | None = None
    keys: int | None = None


def _estimate(
    rows: EstimatingRows, content: Content, label: Array | None = None
) -> tuple[LineMass, Array]:
    """The mass of the last rows, and the keys that compete, ``[batch or 1, keys]``."""
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
        # The last span begins after the last query before it of another modality.
        before = jnp.max(jnp.where(~mine & (place < last), place, -1))
        at = last - (num_rows - 1) + jnp.arange(num_rows)
        span = (at > before) & (at >= 0)
        tail = q[:, jnp.maximum(at, 0)]
        return shared_mass(tail, k, offset + last, span, keys, end), keys

    label = jnp.broadcast_to(label, (q.shape[0], label.shape[-1]))
    return jax.vmap(of_entry)(q, k, label)


def labels(content: Content, least: int) -> Integer[Array, "batch length"]:
    """The operand ``modality``, checked: integers for ``least`` positions or more."""
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
    """See ``vertical_slash_mass``."""

    mass: float
    last: int = 512
    least: int = 512
    forced_columns: int = 4
    forced_slashes: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.mass <= 1:
            raise ValueError(
                f"vertical_slash_mass: mass={self.mass} is a share of the attention: "
                "give one of 0 to 1"
            )
        at_least("vertical_slash_mass", "last", self.last, 1)
        for name in ("least", "forced_columns", "forced_slashes"):
            at_least("vertical_slash_mass", name, getattr(self, name), 0)

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Bools, ``columns [batch, heads, keys]`` and ``slashes``, by offset, alike."""
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
    """A query sees ``vertical`` columns of the past and ``slash`` offsets to it.

    Jiang et al., MInference 1.0, 2024, section 3: head by head, those with the greatest
    mass in the causal softmax of the ``last`` queries, so later tokens decide. The
    first ``forced_columns`` keys and the nearest ``forced_slashes`` offsets come first
    and count in the budget; ties go to the lower index.

    With ``queries=m`` the rows are the last of the last span of modality ``m``, and
    with ``keys=m`` only keys of modality ``m`` compete (Li et al., MMInference, 2025);
    ``operands={"modality": ints [length]}`` then names the modality of each position.
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
    """``vertical_slash`` with budgets that each head takes by itself.

    Lai et al., FlexPrefill, 2025, in the form of Nawrot et al., The sparse frontier,
    2025: among columns, and among slashes, one more than the greatest that together
    stay within ``mass`` of the attention of the ``last`` queries; ``least`` at least,
    and all at most. Forced ones count.
    """
    return VerticalSlashMass(mass, last, least, forced_columns, forced_slashes)
