"""The arguments and results of a linear attention call, for every backend."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from pallas_kernels.linear.chunk import Recurrence, State
from pallas_kernels.linear.marks import Marks


class LinearInputs(NamedTuple):
    """The arrays of a call; ``group`` query heads share a key head.

    ``log_decay`` is f32 and at most 0, ``[_batch heads seq]`` or, by key channel,
    ``[_batch heads seq features]``. Where ``starts`` is true, the state is first set to
    0. ``state`` is the one before the first key, with ``z [batch heads 1 features]``.
    """

    q: Float[Array, "batch heads group seq features"]
    k: Float[Array, "batch heads seq features"]
    v: Float[Array, "batch heads seq head_dim_v"]
    erase: Float[Array, "batch heads seq features"] | None = None
    log_decay: Float[Array, "_batch heads seq ..."] | None = None
    starts: Bool[Array, "_batch seq"] | None = None
    state: State | None = None


class LinearOutputs(NamedTuple):
    """The results of a call; ``total`` is None without a normaliser.

    ``total`` is the sum of weights plus ``eps``, and 0 where it vanishes. ``state`` is
    the state after the last key, f32, each array ``[batch, heads, ...]``.
    """

    out: Float[Array, "batch heads group seq head_dim_v"]  # in the dtype of q
    total: Float[Array, "batch heads group seq"] | None
    state: State


@dataclass(frozen=True)
class LinearCall:
    """The static part of a call.

    A step of the grid of "tpu" works through ``span`` chunks, one after the other.
    """

    rule: Recurrence
    chunk: int
    interpret: Hashable = False
    num_warps: int = 4
    num_stages: int = 2
    span: int = 1

    @property
    def step(self) -> int:
        """The positions of a grid step."""
        return self.chunk * self.span


class ChunkInputs(NamedTuple):
    """The arrays that backends read: flat heads, and a sequence padded to chunks.

    The length is a multiple of ``LinearCall.step``.
    Padding has keys and values of 0 and no decay, so it does not change the state. An
    entry of ``marks`` is an array ``[heads, chunks, chunk]``, where a chunk has a
    ``Pair``. Block specs and refs have this structure too.
    """

    q: Any  # [heads, group, padded, features]
    k: Any  # [heads, padded, features]
    v: Any  # [heads, padded, head_dim_v]
    erase: Any  # [heads, padded, features], or None
    gate: Any  # f32 [heads, padded, features], or None
    marks: Marks
    state: Any  # State of f32 [heads, features, head_dim_v], [heads, 1, features]


class ChunkOutputs(NamedTuple):
    """The results of a backend, or their cotangents."""

    out: Any  # [heads, group, padded, head_dim_v]
    total: Any  # f32 [heads, group, padded], or None
    state: Any  # like that of ChunkInputs
