"""The passes of a kind of call: what ``primitive.py`` differentiates."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import jax

from pallas_kernels import dense
from pallas_kernels.call import Call, Inputs, Kept, Outputs, Vectors
from pallas_kernels.xla.backward import backward
from pallas_kernels.xla.forward import forward
from pallas_kernels.xla.tangent import tangent


class Passes(NamedTuple):
    """The passes over the pairs of a call, each in memory linear in the lengths.

    ``over_pairs`` is the forward pass in plain JAX over all pairs, ``(inputs, vectors,
    tests, lists, call) -> Outputs``. The others have the arguments of the functions of
    this package with these names.
    """

    forward: Callable[..., Kept]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    tangent: Callable[..., Outputs]
    over_pairs: Callable[..., Outputs]


@singledispatch
def passes(call: Any) -> Passes:
    """The passes of a kind of call, by the class of its static part."""
    raise TypeError(f"{call!r} is not a call of the XLA backend")


@passes.register
def _(call: Call) -> Passes:
    """The passes over the blocks of a plan."""
    del call

    def of_all(
        inputs: Inputs, vectors: Vectors, tests: Any, lists: Any, call: Call
    ) -> Outputs:
        del lists
        return dense.forward(inputs, vectors, tests, call)

    return Passes(forward, backward, tangent, of_all)
