"""Default chunk lengths and launch options of linear attention."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from pallas_kernels.config import KernelConfig, even_block
from pallas_kernels.linear.algebra import Recurrence
from pallas_kernels.linear.call import LinearCall
from pallas_kernels.linear.marks import LONGEST_CHUNK
from pallas_kernels.tpu.runs import LANES
from pallas_kernels.triton.tiles import power_of_two

# xla: the fastest of 32 to 256 on two cores. tpu: the fewest bundles per token.
CHUNKS = {"xla": 64, "tpu": 256}


def default_call(
    rule: Recurrence,
    impl: str,
    sizes: tuple[int, int, int],
    dtype: jax.typing.DTypeLike,
    config: KernelConfig,
    interpret: Hashable = False,
) -> LinearCall:
    """The static part of a call; ``sizes`` are ``(length, features, head_dim_v)``.

    The length of a chunk is ``config.block_kv``, else ``config.block_q``, else a
    default that is not longer than the sequence needs.

    Raises:
      ValueError: the chunk is too long.
    """
    length, warps = sizes[0], 4
    match impl:
        case "xla":
            chunk = min(CHUNKS[impl], max(length, 1))
        case "tpu":
            chunk = even_block(CHUNKS[impl], length, LANES)
        case _:
            chunk, warps = _triton(max(sizes[1:]), dtype)
            chunk = min(chunk, power_of_two(length))
    chunk = config.block_kv or config.block_q or chunk
    if chunk > LONGEST_CHUNK:
        raise ValueError(
            f"config: a chunk of {chunk} positions (block_kv, or else block_q) must "
            f"be at most {LONGEST_CHUNK}, so that the log-decays of a chunk keep their "
            "precision: leave both None, or give a smaller one"
        )
    return LinearCall(
        rule=rule,
        chunk=chunk,
        interpret=interpret,
        num_warps=config.num_warps or warps,
        num_stages=config.num_stages or 1,
    )


def _triton(size: int, dtype: jax.typing.DTypeLike) -> tuple[int, int]:
    """Chunk and warps, chosen by the registers of the code compiled for sm_90."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return 64, 8
    return (32, 8) if size <= 64 else (16, 8)
