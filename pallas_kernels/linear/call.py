"""What a call of a linear recurrence is made of: the contract of its backends."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from pallas_kernels.linear.algebra import Marks, Recurrence


class LinearInputs(NamedTuple):
    """The arrays of a call; ``group`` queries share a key head.

    ``log_decay`` is at most 0 and f32: the state is multiplied by its exponential
    before it takes in the key of that position. Where ``starts`` it is emptied first.
    """

    q: Float[Array, "batch heads group seq features"]
    k: Float[Array, "batch heads seq features"]
    v: Float[Array, "batch heads seq head_dim_v"]
    log_decay: Float[Array, "_batch heads seq"] | None = None
    starts: Bool[Array, "_batch seq"] | None = None


class LinearOutputs(NamedTuple):
    """What a call yields; ``total`` is None without a normaliser.

    ``total`` is the sum of weights plus ``eps``, 0 where it vanishes.
    """

    out: Float[Array, "batch heads group seq head_dim_v"]  # in the dtype of q
    total: Float[Array, "batch heads group seq"] | None


@dataclass(frozen=True)
class LinearCall:
    """The static part of a call."""

    rule: Recurrence
    chunk: int
    interpret: Hashable = False
    num_warps: int = 4
    num_stages: int = 2


class ChunkInputs(NamedTuple):
    """The arrays as backends see them: heads flat, the sequence padded to chunks.

    What is padded has keys and values of 0, so that no state knows of it. ``marks``
    has an array ``[heads, chunks, chunk]`` where those of a chunk have a ``Pair``.
    Blocks and their specs come in this form too.
    """

    q: Any  # [heads, group, padded, features]
    k: Any  # [heads, padded, features]
    v: Any  # [heads, padded, head_dim_v]
    marks: Marks


class ChunkOutputs(NamedTuple):
    """What a backend yields for the queries of a call, or takes as cotangents."""

    out: Any  # [heads, group, padded, head_dim_v]
    total: Any  # f32 [heads, group, padded], or None
