"""Selects keys whose logit is close to an anchor logit (AnchorAttention).

Zhang et al., AnchorAttention: difference-aware sparse attention with stripe
granularity, 2025, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from typing_extensions import override

from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection


@dataclass(frozen=True, repr=False)
class Stripes(NamedSelection):
    """Keys that a group of queries shares; made by ``stripes``."""

    # The queries of a group share their keys.
    leak: ClassVar[Leak] = "block"

    theta: float = 12.0
    init: int = 128
    block: int = 128
    step: int = 16

    def __post_init__(self) -> None:
        if not np.isfinite(self.theta):
            raise ValueError(
                f"stripes: theta={self.theta} must be finite: to select every key, "
                "give a number far above all logits"
            )
        for name, least in {"init": 0, "block": 1, "step": 1}.items():
            at_least("stripes", name, getattr(self, name), least)

    @property
    def group(self) -> int:
        """The number of queries that share their keys."""
        return self.block * self.step

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Chooses ``chosen``, bools ``[batch, heads, groups, keys]``.

        Groups count from the first query. Memory: a block of queries times the keys of
        a group, and the result.
        """
        if content.q_offset % self.group:
            raise ValueError(
                f"stripes: q_offset={content.q_offset} must be a multiple of "
                f"block * step = {self.group}, so that a call begins with a whole group"
            )
        batch, heads, length, dim = content.q.shape
        groups = -(-length // self.group)
        spare = groups * self.group - length
        q = jnp.pad(content.queries(), ((0, 0), (0, 0), (0, spare), (0, 0)))
        q = q.reshape(batch, heads, groups, self.step, self.block, dim)
        k = content.keys()

        def of_group(g: Array) -> Array:
            mine = jax.lax.dynamic_index_in_dim(q, g, axis=2, keepdims=False)
            row = g * self.group + jnp.arange(self.group).reshape(-1, self.block)
            return self._group(mine, k, row, length, content)

        found = jax.lax.map(of_group, jnp.arange(groups))
        return {"chosen": jnp.moveaxis(found, 0, 2)}

    def _group(
        self, q: Array, k: Array, row: Array, length: int, content: Content
    ) -> Array:
        """The keys of one group, bools ``[batch, heads, keys]``.

        ``q`` is ``[batch, heads, step, block, head_dim]``, ``row``, the index of each
        query, ``[step, block]``.
        """
        num_keys = k.shape[2]
        start = content.q_offset + row[0, 0]
        near = start + jnp.arange(self.group)
        at = jnp.concatenate([jnp.arange(min(self.init, num_keys)), near])
        # A key may be in both parts of `at`; that does not change a maximum.
        exists = at < num_keys
        keys = k[:, :, jnp.clip(at, 0, num_keys - 1)]

        def of_block(args: tuple[Array, Array]) -> tuple[Array, Array]:
            q, row = args
            logits = jnp.einsum("...qd,...kd->...qk", q, keys) * content.sm_scale
            sees = exists[None, :] & (at[None, :] <= content.q_offset + row[:, None])
            held = jnp.isfinite(logits) & jnp.broadcast_to(sees, logits.shape)
            top = jnp.max(logits, axis=-1, initial=-jnp.inf, where=held)
            real = jnp.broadcast_to(row < length, top.shape)
            count = jnp.maximum(jnp.sum(row < length), 1).astype(jnp.float32)
            anchor = jnp.where(real, top, 0.0).sum(axis=-1) / count
            return anchor, jnp.where(real[..., None], q, 0.0).sum(axis=-2) / count

        anchor, mean = jax.lax.map(of_block, (jnp.moveaxis(q, 2, 0), row))
        score = jnp.einsum("s...d,...kd->s...k", mean, k) * content.sm_scale
        anchor = anchor[..., None]
        finite = jnp.isfinite(score) & jnp.isfinite(anchor)
        real = (row[:, 0] < length).reshape(-1, 1, 1, 1)
        place = jnp.arange(num_keys)
        between = (place >= self.init) & (place < start)
        passed = (finite & real & (score + self.theta > anchor)).any(axis=0)
        return passed & jnp.broadcast_to(between, passed.shape)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        local = q // self.group == k // self.group
        stripe = self.part("chosen")[h, q // self.group, k] == 1
        return (k <= q) & ((k < self.init) | local | stripe)


def stripes(
    theta: float = 12.0, *, init: int = 128, block: int = 128, step: int = 16
) -> Stripes:
    """A query sees the first keys, its own group, and the keys of comparable logits.

    Zhang et al., AnchorAttention, 2025, section 3. A group is ``step`` blocks of
    ``block`` queries. The anchor of a query is its greatest logit among the first keys
    and the keys of its group up to itself. A group sees another key iff, for one of its
    blocks, ``mean(q) . k * sm_scale + theta`` exceeds the mean anchor of the block. The
    bits of these keys take ``kv_seq_len / 8`` bytes for each group and head.

    Args:
      theta: how far below the anchor a logit may be, in natural-log units.
      init: how many of the first keys every query sees.
      block: queries in a block.
      step: blocks in a group.

    Raises:
      ValueError: ``theta`` is not finite, or a size is too small; in a call,
        ``q_offset`` is not a multiple of the size of a group.

    Example:
      >>> from sadsl.selections import stripes
      >>> spec = stripes(init=1, block=2, step=1)
      >>> chosen = {spec.key("chosen"): [[[0, 0, 0, 0], [0, 1, 0, 0]]]}
      >>> print(spec.dense(4, operands=chosen)[0].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 1 1]]
    """
    return Stripes(theta, init, block, step)
