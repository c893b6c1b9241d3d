"""The options of jax's splash attention that its callers build."""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Integer


class SplashSegmentIds(NamedTuple):
    """The documents of packed sequences: a query sees the keys of its own document."""

    q: Integer[Array, " q_seq"]
    kv: Integer[Array, " kv_seq"]


class QKVLayout(enum.IntEnum):
    """The layout of an array inside of jax's kernel; callers always pass the first."""

    HEAD_DIM_MINOR = enum.auto()
    SEQ_MINOR = enum.auto()


@dataclass(frozen=True)
class SplashBlockSizes:
    """The block sizes of jax's kernels, which do not change a result.

    Our kernels do not use them: their blocks follow from the plan of the mask, the
    head size and the device, backward blocks are never missing, and no pass has a
    ``compute`` size of its own. To choose blocks, pass ``config=KernelConfig(...)``.
    """

    block_q: int
    block_kv: int
    block_kv_compute: int | None = None
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    block_kv_dkv_compute: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None
    use_fused_bwd_kernel: bool = False
    q_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    k_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    v_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR

    def __post_init__(self) -> None:
        if self.block_kv_compute is None:
            object.__setattr__(self, "block_kv_compute", self.block_kv)
        if self.block_kv_dkv_compute is None:
            object.__setattr__(self, "block_kv_dkv_compute", self.block_kv_dkv)
        has_dq = (self.block_q_dq, self.block_kv_dq) != (None, None)
        if self.use_fused_bwd_kernel and has_dq:
            raise ValueError(
                f"BlockSizes: block_q_dq={self.block_q_dq} and block_kv_dq="
                f"{self.block_kv_dq} contradict use_fused_bwd_kernel=True, which has "
                "no dq kernel: leave them None"
            )

    @property
    def has_backward_blocks(self) -> bool:
        """Whether jax's kernels could compute a gradient with these sizes."""
        dkv = self.block_q_dkv, self.block_kv_dkv, self.block_kv_dkv_compute
        dq = () if self.use_fused_bwd_kernel else (self.block_q_dq, self.block_kv_dq)
        return None not in (*dkv, *dq)

    @classmethod
    def get_default(cls) -> "SplashBlockSizes":
        """Blocks of 128 everywhere."""
        return cls(*(128,) * 8)


# The names that they have in jax.
SegmentIds, BlockSizes = SplashSegmentIds, SplashBlockSizes
