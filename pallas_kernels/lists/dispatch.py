"""Runs one call by lists on a chosen backend."""

from collections.abc import Callable

from jaxtyping import Array

from pallas_kernels.call import Inputs, Outputs, Vectors
from pallas_kernels.lists import triton, xla
from pallas_kernels.lists.call import ListCall
from pallas_kernels.varying import alike

BACKENDS: dict[str, Callable[..., Outputs]] = {
    "xla": xla.attend_lists,
    "triton": triton.attend_lists,
}


def attend(
    inputs: Inputs, vectors: Vectors, index: Array, call: ListCall, *, impl: str
) -> Outputs:
    """Outputs and lse of the pairs of lists, both differentiable.

    It works under ``jit``, ``vmap``, ``jax.checkpoint`` and ``shard_map``.
    """
    inputs, vectors, index = alike((inputs, vectors, index))
    return BACKENDS[impl](inputs, vectors, index, call)
