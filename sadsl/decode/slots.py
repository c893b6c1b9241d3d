"""Where tokens lie in a cache: the first ones stay, and a ring holds the last ones."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class CacheSlots:
    """The slots of a cache for ``length`` tokens.

    Position ``p`` is in slot ``p`` if it is below ``pinned``, else in slot ``pinned +
    (p - pinned) % ring``, until a later position takes that slot.
    """

    pinned: int
    ring: int
    length: int

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.pinned + self.ring

    @property
    def hold_all(self) -> bool:
        """Whether slot ``p`` holds position ``p`` for good."""
        return self.size >= self.length

    def of(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        """The slot of each position."""
        if self.hold_all:
            return position
        later = self.pinned + (position - self.pinned) % self.ring
        return jnp.where(position < self.pinned, position, later)

    def positions(self, count: Int[Array, "*batch"]) -> Int[Array, "*batch slots"]:
        """The position in each slot after ``count`` tokens; -1 for an empty slot.

        Example:
          >>> import jax.numpy as jnp
          >>> CacheSlots(1, 4, 100).positions(jnp.int32(7)).tolist()
          [0, 5, 6, 3, 4]
        """
        last = jnp.asarray(count, jnp.int32)[..., None] - 1
        slot = jnp.arange(self.size, dtype=jnp.int32)
        slot = slot.reshape(*[1] * (last.ndim - 1), -1)
        if self.hold_all:
            return jnp.where(slot <= last, slot, -1)
        turns = (last - slot) % self.ring if self.ring else last - slot
        ring = jnp.where(last - turns >= self.pinned, last - turns, -1)
        return jnp.where(
            slot < self.pinned, jnp.where(slot <= last, slot, -1), ring
        ).astype(jnp.int32)

    def written(
        self, count: Int[Array, ""], new: int, valid: Int[Array, ""] | int
    ) -> Int[Array, " new"]:
        """The slots of ``new`` tokens after ``count``; ``size`` for those not kept.

        The first ``valid`` of them exist. One that a later one would overwrite at once
        is not kept.
        """
        index = jnp.arange(new, dtype=jnp.int32)
        position = count + index
        kept = index < valid
        if not self.hold_all:
            lasts = position >= count + valid - self.ring
            kept &= lasts | (position < self.pinned)
        return jnp.where(kept, self.of(position), self.size)
