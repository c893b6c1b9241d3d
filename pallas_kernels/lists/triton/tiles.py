"""Tile sizes of the kernels by lists, from the registers that they need."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.call import Inputs
from pallas_kernels.shared_values import Values
from pallas_kernels.triton.channels import padded_dim
from pallas_kernels.triton.tiles import SMALLEST, power_of_two

# An f32 accumulator of so many numbers takes 64 registers of each of 128 threads.
ACCUMULATED = 8192
# A gathered chunk of keys and values, or of queries and cotangents, takes so many bytes
# of shared memory, so that a multiprocessor has room for several programs.
GATHERED = 1 << 15


@dataclass(frozen=True)
class ListTile:
    """The sizes of a program: ``fixed`` rows of a product, ``gathered`` at a step.

    The fixed side is the members of a row, or keys in ``dkv``. The other side is
    gathered. Both are powers of two.
    """

    fixed: int
    gathered: int
    num_warps: int
    num_stages: int

    def parts(self, count: int) -> int:
        """The programs that ``count`` rows of the fixed side need."""
        return -(-count // self.fixed)

    def steps(self, count: int) -> int:
        """The steps that ``count`` rows of the gathered side need."""
        return -(-count // self.gathered)


class ListTiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: ListTile
    dq: ListTile
    dkv: ListTile


class Dims(NamedTuple):
    """The channels of a call, with padding."""

    key: int
    value: int
    both: int  # of a key and its value, where values may be channels of the keys


def dims_of(inputs: Inputs, values: Values | None) -> Dims:
    """The channels that the kernels of a call load and add up."""
    key = padded_dim(inputs.k.shape[-1], values)
    value = power_of_two(inputs.v.shape[-1])
    return Dims(key, value, key if values else key + value)


def tiles(
    members: int, keys: int, dims: Dims, dtype: jax.typing.DTypeLike
) -> ListTiles:
    """The tiles for rows of ``members`` and spans of ``keys``.

    Gathers bound these kernels, since a key serves few members. So a program keeps the
    fixed side in registers, and as much of it as they hold, since all of it shares what
    is gathered. Two stages load a chunk while the one before is multiplied, and several
    programs on a multiprocessor hide the rest of the latency.

    Full-precision products run outside of the tensor cores with all their operands in
    registers, so f32 has eight warps.

    Args:
      members: the queries and heads of a row.
      keys: the keys of a span (``transposed.KeySpans``).
      dims: of the inputs.
      dtype: that of the inputs.
    """
    size = jnp.dtype(dtype).itemsize
    fits = GATHERED // (dims.both * size)
    chunk = max(SMALLEST, min(128, 1 << max(fits, 1).bit_length() - 1))

    def tile(fixed: int, accumulated: int) -> ListTile:
        """The tile of a program that accumulates ``accumulated`` numbers a row."""
        most = max(SMALLEST, ACCUMULATED // accumulated)
        fixed = min(power_of_two(fixed), most)
        wide = size >= 4 or fixed * accumulated >= ACCUMULATED
        return ListTile(fixed, chunk, num_warps=8 if wide else 4, num_stages=2)

    return ListTiles(
        tile(members, dims.value),
        tile(members, dims.key),
        tile(keys, dims.both),
    )
