"""``Shard``: the part of a sharded call that one device has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lowering.partition.shards import Shards
from sadsl.run.types import QKV, Setting
from sadsl.sharding.operand_axes import OperandAxes, TokenAxis
from sadsl.terms.base import Spec, read_by


@dataclass(frozen=True)
class Shard:
    """What a device holds inside of ``shard_map``.

    Attributes:
      axis: the mesh axis of the sequence.
      shards: how positions are dealt along it.
      inputs: q, k and v of the shard, ``[batch, seq, heads, dim]``, padded.
      given: the run-time arrays of the call; those with an entry for each token have
        the entries of the shard, along ``axes[name].tokens``.
      axes: the axes of these arrays.
      setting: the options of the call.
      queries: the positions of the queries; None if they are those of the shard.
    """

    axis: str
    shards: Shards
    inputs: QKV
    given: Mapping[str, Any]
    axes: Mapping[str, OperandAxes]
    setting: Setting
    queries: Int[Array, " q"] | None = None

    @property
    def index(self) -> Int[Array, ""]:
        """The number of this shard."""
        return jax.lax.axis_index(self.axis)

    @property
    def first_query(self) -> Int[Array, ""]:
        """The position of the first query of this shard."""
        return jnp.int32(self.index * self.shards.q_size)

    @property
    def query_positions(self) -> Int[Array, " q"]:
        """The position of each query, int32."""
        if self.queries is not None:
            return self.queries
        return self.first_query + jnp.arange(self.shards.q_size, dtype=jnp.int32)

    @property
    def first_key(self) -> Int[Array, ""]:
        """The position of the first key of this shard."""
        return jnp.int32(self.index * self.shards.kv_size)

    def of(self, term: Spec) -> dict[str, Any]:
        """The given arrays that a term reads."""
        return read_by(term, self.given)

    def by_token(self, term: Spec) -> dict[str, TokenAxis]:
        """The given arrays that a term reads with an entry for each token."""
        known = {n: self.axes[n].tokens for n in self.of(term) if n in self.axes}
        return {name: axis for name, axis in known.items() if axis is not None}

    def with_inputs(self, *inputs: Array) -> "Shard":
        """The same with other q, k and v."""
        q, k, v = inputs
        return replace(self, inputs=(q, k, v))

    def gathered(self, x: Array, axis: int, length: int) -> Array:
        """An array with the entries of all shards, without padding."""
        whole = jax.lax.all_gather(x, self.axis, axis=axis, tiled=True)
        return jax.lax.slice_in_dim(whole, 0, length, axis=axis)
