"""Keys that stay in the cache after a prompt.

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
    """See ``kept_keys``."""

    # What is kept depends on the prompt and matters to the tokens after it alone.
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
                f"kept_keys: pool={self.pool} must be odd: a key is its middle"
            )

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Bools ``kept [batch, heads, prompt]``, alike in the heads of a key head."""
        offset, num_queries = content.q_offset, content.q.shape[2]
        end = min(self.prompt, offset + num_queries)
        start = max(self.prompt - self.last, 0)
        if content.k.shape[2] < self.prompt or end < self.prompt or offset > start:
            raise ValueError(
                f"kept_keys: the queries {start} to {self.prompt - 1} choose among the "
                f"{self.prompt} keys of the prompt, but queries {offset} to "
                f"{offset + num_queries - 1} and {content.k.shape[2]} keys were given: "
                "choose when the prompt is there, by `sadsl.select(...)`, and "
                "pass what it returns as operands= later"
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
        """The mean over ``pool`` neighbours; beyond the ends are zeros that count."""
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
    """Tokens after a prompt see ``capacity`` of its ``prompt`` keys, and later ones.

    Li et al., SnapKV, 2024, section 4: the causal softmax of the ``last`` queries of
    the prompt, averaged over them and over the query heads of a key head and smoothed
    over ``pool`` neighbours, says which. The ``first`` and the ``recent`` keys stay and
    count. The prompt itself is attended to densely.
    """
    return KeptKeys(prompt, capacity, last, pool, first, recent)
