"""What is handed from one term to its parts while a call runs."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array

from pallas_kernels.config import KernelConfig


@dataclass(frozen=True)
class Setting:
    """The options of a call, the same for all its parts.

    All are static, but for a scale that is traced: ``sm_scale`` is a Python float, or a
    float32 scalar.
    """

    sm_scale: Any
    q_offset: int = 0
    impl: str = "xla"
    interpret: Hashable = False
    config: KernelConfig = field(default_factory=KernelConfig)
    dropout_rate: float = 0.0


class Outcome(NamedTuple):
    """What a term yields: out ``[batch, q_seq, num_q_heads, head_dim_v]``, and its lse.

    ``lse`` is the natural logarithm of the normaliser, ``[batch, num_q_heads, q_seq]``,
    or None where no single one belongs to a query. A query that sees nothing has output
    0 and ``lse == -inf``.
    """

    out: Array
    lse: Array | None


QKV: TypeAlias = tuple[Array, Array, Array]
