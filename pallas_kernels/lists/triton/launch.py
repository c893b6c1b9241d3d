"""Sizes, block specs and launch options of the kernels by lists."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.call import Inputs, Vectors
from pallas_kernels.lists.call import ListCall, num_blocks
from pallas_kernels.lists.triton.tiles import ListTile
from pallas_kernels.shared_values import Values
from pallas_kernels.triton.launch import rows_first, whole
from pallas_kernels.triton.tiles import SMALLEST

# The most that int32 counts, less what the last step of a loop has too much.
MOST = 2**31 - 1024


@dataclass(frozen=True)
class GatherSizes:
    """The static sizes of a call by lists.

    A *unit* is the query heads that share a list and a key head: ``units`` of each
    batch entry. A *member* of a row is one query of the row and one head of the unit.
    The members are the rows of a product; the head changes fastest.
    """

    batch: int
    q_heads: int
    kv_heads: int
    groups: int
    lists: int  # batch entries of the lists
    q_seq_len: int
    kv_seq_len: int
    rows: int
    listed: int  # blocks in a list
    block_q: int
    block_kv: int

    @property
    def units(self) -> int:
        """The units of a batch entry."""
        return max(self.groups, self.kv_heads)

    @property
    def heads(self) -> int:
        """The query heads of a unit."""
        return self.q_heads // self.units

    @property
    def members(self) -> int:
        """The members of a row."""
        return self.block_q * self.heads

    @property
    def units_of_key(self) -> int:
        """The units that share a key head."""
        return self.units // self.kv_heads

    @property
    def blocks(self) -> int:
        """The blocks of keys."""
        return num_blocks(self.kv_seq_len, self.block_kv)


def sizes_of(inputs: Inputs, index: Array, call: ListCall) -> GatherSizes:
    """The sizes of a call.

    Raises:
      NotImplementedError: the lists are too long for 32-bit numbers.
    """
    batch, q_heads, q_seq_len, _ = inputs.q.shape
    _, kv_heads, kv_seq_len, _ = inputs.k.shape
    lists, groups, rows, listed = index.shape
    sizes = GatherSizes(
        batch, q_heads, kv_heads, groups, lists, q_seq_len, kv_seq_len, rows, listed,
        call.block_q, call.block_kv,
    )  # fmt: skip
    # The pairs of block and row of a key head, and the members of a stretch.
    pairs = rows * listed * sizes.units_of_key
    most = max(pairs, rows * sizes.units_of_key * SMALLEST * sizes.members)
    if most > MOST:
        raise NotImplementedError(
            f"{rows} lists of {listed} blocks, with {sizes.members} queries and heads "
            f"each: impl='triton' counts up to {most} in 32 bits, where the limit is "
            f"{MOST}; attend to fewer queries in one call"
        )
    return sizes


def arranged(x: jax.Array, values: Values | None = None) -> jax.Array:
    """``[batch, heads, seq, ...]`` as ``[batch, seq, heads, ...]``.

    The members of a query are then neighbours in memory. A last axis of features is
    padded for products.
    """
    if x.ndim == 3:
        return jnp.swapaxes(x, 1, 2)
    return rows_first(x, x.shape[2], values)


def arranged_inputs(inputs: Inputs, values: Values | None) -> Inputs:
    """The arranged inputs; there is no ``v`` if the values are channels of ``k``."""
    v: Any = None if values else arranged(inputs.v)
    return Inputs(arranged(inputs.q, values), arranged(inputs.k, values), v)


def unit_spec(x: Any, sizes: GatherSizes) -> pl.BlockSpec:
    """The spec of arranged queries for a grid ``(program, unit, batch)``."""
    return whole(x, sizes.heads, head_axis=2)


def unit_specs(inputs: Inputs, sizes: GatherSizes) -> Inputs:
    """The specs of arranged inputs for a grid ``(program, unit, batch)``."""
    q, k, v = inputs
    shared = sizes.units_of_key
    value = None if v is None else whole(v, group=shared)
    specs: Any = unit_spec(q, sizes), whole(k, group=shared), value
    return Inputs(*specs)


def list_spec(sizes: GatherSizes, tile: ListTile) -> pl.BlockSpec:
    """The spec of the list of the row of a program."""
    parts = tile.parts(sizes.members)

    def at(program: Any, unit: Any, batch: Any) -> tuple:
        group = jax.lax.div(unit, jnp.int32(sizes.units // sizes.groups))
        row = jax.lax.div(program, jnp.int32(parts))
        return (batch if sizes.lists > 1 else 0), group, row, 0

    return pl.BlockSpec((None, None, None, sizes.listed), at)


def vector_specs(vectors: Vectors) -> Vectors:
    """The specs of vectors, which have one head."""
    return jax.tree.map(lambda x: whole(x, head_axis=1), vectors)


def options(tile: ListTile, call: ListCall, name: str) -> dict[str, Any]:
    """The launch options of a ``pallas_call``."""
    params = plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return {
        "compiler_params": params,
        "interpret": call.interpret,
        "name": f"sadsl_lists_{name}",
    }
