"""Selects the keys of a prompt that stay in the cache for later tokens (SnapKV).

Li et al., SnapKV: LLM knows what you are looking for before generation, 2024.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array
from typing_extensions import override

from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth, minimum
from sadsl.selections.base import Content, Leak, NamedSelection
from sadsl.selections.vertical_slash import best, shared_mass


@dataclass(frozen=True, repr=False)
class KeptKeys(NamedSelection):
    """The keys of a prompt that later tokens see; made by ``kept_keys``."""

    # The choice depends on the prompt, and only tokens after the prompt use it.
    leak: ClassVar[Leak] = "none"

    prompt: int
    capacity: int
    last: int = 256
    pool: int = 21
    first: int = 4
    recent: int = 128

    def __post_init__(self) -> None:
        least = {"prompt": 1, "capacity": 0, "last": 1, "pool": 1, "first": 0}
        for name, value in (least | {"recent": 0}).items():
            at_least("kept_keys", name, getattr(self, name), value)
        if self.pool % 2 == 0:
            raise ValueError(
                f"kept_keys: pool={self.pool} must be odd, so that a key is in the "
                f"middle of its neighbours: give {self.pool + 1}"
            )

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Chooses ``kept``, bools ``[batch, heads, prompt]``, equal for a key head."""
        offset, num_queries = content.q_offset, content.q.shape[2]
        end = min(self.prompt, offset + num_queries)
        start = max(self.prompt - self.last, 0)
        if content.k.shape[2] < self.prompt or end < self.prompt or offset > start:
            raise ValueError(
                f"kept_keys: the queries {start} to {self.prompt - 1} choose among the "
                f"{self.prompt} keys of the prompt, but queries {offset} to "
                f"{offset + num_queries - 1} and {content.k.shape[2]} keys were given: "
                "call `sadsl.select(...)` with the prompt, and pass its result as "
                "operands= in later calls"
            )
        q = content.queries()[:, :, start - offset : end - offset] * content.sm_scale
        k = content.keys()[:, :, : self.prompt]
        rows, keys = jnp.ones(end - start, bool), jnp.ones(self.prompt, bool)
        found = shared_mass(q, k, self.prompt - 1, rows, keys, 1).columns
        seen = found > -jnp.inf
        pooled = jnp.where(seen, self._pooled(jnp.where(seen, found, 0.0)), jnp.nan)
        batch, _, length = pooled.shape
        groups = pooled.reshape(batch, -1, content.group, length).mean(axis=2)
        place = jnp.arange(length)
        forced = (place < self.first) | (place >= self.prompt - self.recent)
        kept = best(groups, self.capacity, forced)
        return {"kept": jnp.repeat(kept, content.group, axis=1)}

    def _pooled(self, x: Array) -> Array:
        """The mean over ``pool`` neighbours; positions beyond the ends count as 0."""
        side = self.pool // 2
        lengths, ones = (1, 1, self.pool), (1, 1, 1)
        total = jax.lax.reduce_window(
            x, 0.0, jax.lax.add, lengths, ones, ((0, 0), (0, 0), (side, side))
        )
        return total / self.pool

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        kept = self.part("kept")[h, minimum(k, self.prompt - 1)] == 1
        return (k <= q) & ((q < self.prompt) | (k >= self.prompt) | kept)


def kept_keys(
    prompt: int,
    capacity: int,
    *,
    last: int = 256,
    pool: int = 21,
    first: int = 4,
    recent: int = 128,
) -> KeptKeys:
    """Tokens after a prompt see ``capacity`` keys of the prompt, and all later keys.

    Li et al., SnapKV, 2024, section 4. A key of the prompt is scored by the causal
    softmax of the last queries of the prompt, averaged over them and over the query
    heads of its key head, and smoothed over neighbours. Within the prompt, attention is
    causal and dense.

    Args:
      prompt: tokens of the prompt.
      capacity: keys of the prompt that are kept.
      last: how many of the last queries of the prompt score the keys.
      pool: neighbours over which scores are averaged; odd.
      first: how many of the first keys are always kept; they count in ``capacity``.
      recent: how many of the last keys of the prompt are always kept; they count.

    Raises:
      ValueError: a size is too small, or ``pool`` is even; in a call that makes the
        choice, the prompt is not given.

    Example:
      >>> from sadsl.selections import kept_keys
      >>> spec = kept_keys(prompt=3, capacity=1)
      >>> kept = {spec.key("kept"): [[0, 1, 0]]}
      >>> print(spec.dense(5, operands=kept)[0].astype(int))
      [[1 0 0 0 0]
       [1 1 0 0 0]
       [1 1 1 0 0]
       [0 1 0 1 0]
       [0 1 0 1 1]]
    """
    return KeptKeys(prompt, capacity, last, pool, first, recent)
