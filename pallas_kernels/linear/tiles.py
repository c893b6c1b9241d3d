"""Default chunk lengths and launch options of linear attention."""

from collections.abc import Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.config import KernelConfig, even_block
from pallas_kernels.linear.call import LinearCall
from pallas_kernels.linear.chunk import Recurrence
from pallas_kernels.linear.marks import LONGEST_CHUNK
from pallas_kernels.tpu.runs import LANES
from pallas_kernels.triton.tiles import power_of_two

# xla: the fastest of 32 to 256 on two cores. With erase vectors or log-decays by
# channel, the products within a chunk cost more.
CHUNKS = {"xla": 64, "tpu": 256}
SOLVED_CHUNKS = {"xla": 32, "tpu": 128}
# The positions of a grid step on TPUs, which may have several chunks. Bundles of a
# token of one head, forward and backward together, head_dim 128, v5e / v6e: decay by
# head: 19.2 / 18.9 in chunks of 128, 16.2 / 14.1 in two of 128 a step, 16.2 / 12.4 in
# one of 256. Erase vectors: 29.6 / 25.8 in chunks of 128, 51.4 / 34.7 in one of 256,
# 27.2 / 23.9 in two of 128 a step. Steps of 512 save another 1 to 5 percent of both,
# but their blocks take twice the memory.
TPU_STEP = 256


@dataclass(frozen=True)
class LinearSizes:
    """What the length of a chunk depends on.

    Attributes:
      length: the number of positions.
      features, head_dim_v: the sizes of a state.
      erase: whether there are erase vectors.
      by_channel: whether there are log-decays by channel.
    """

    length: int
    features: int
    head_dim_v: int
    erase: bool = False
    by_channel: bool = False


def default_call(
    rule: Recurrence,
    impl: str,
    sizes: LinearSizes,
    dtype: jax.typing.DTypeLike,
    config: KernelConfig,
    interpret: Hashable = False,
) -> LinearCall:
    """The static part of a call.

    The length of a chunk is ``config.block_kv``, else ``config.block_q``, else a
    default that is not longer than the sequence needs. On TPUs it is the length of a
    grid step, which is worked through in chunks of 128 or 256 if they divide it.

    Raises:
      ValueError: the chunk is too long, or must be a power of two.
    """
    chunks = SOLVED_CHUNKS if sizes.erase or sizes.by_channel else CHUNKS
    warps = 4
    match impl:
        case "xla":
            chunk = min(chunks[impl], 1 << max(sizes.length - 1, 0).bit_length())
        case "tpu":
            chunk = even_block(TPU_STEP, sizes.length, LANES)
        case _:
            chunk, warps = _triton(max(sizes.features, sizes.head_dim_v), dtype)
            chunk = min(chunk, power_of_two(sizes.length))
    chunk, span = config.block_kv or config.block_q or chunk, 1
    if chunk > LONGEST_CHUNK:
        raise ValueError(
            f"config: a chunk of {chunk} positions (block_kv, or else block_q) must "
            f"be at most {LONGEST_CHUNK}, so that the log-decays of a chunk keep their "
            "precision: leave both None, or give a smaller one"
        )
    if impl == "tpu" and chunk % chunks[impl] == 0:
        chunk, span = chunks[impl], chunk // chunks[impl]
    if sizes.by_channel and chunk & (chunk - 1):
        raise ValueError(
            f"config: a chunk of {chunk} positions (block_kv, or else block_q) must be "
            "a power of two, since decays by channel are summed in halves: leave both "
            f"None, or give {power_of_two(chunk)}"
        )
    return LinearCall(
        rule=rule,
        chunk=chunk,
        interpret=interpret,
        num_warps=config.num_warps or warps,
        num_stages=config.num_stages or 1,
        span=span,
    )


def _triton(size: int, dtype: jax.typing.DTypeLike) -> tuple[int, int]:
    """Chunk and warps, chosen by the registers of the code compiled for sm_90."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return 64, 8
    return (32, 8) if size <= 64 else (16, 8)
