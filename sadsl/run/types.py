"""``Setting`` and ``Outcome``: what each rule of ``attend`` takes and returns."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array

from pallas_kernels.config import KernelConfig


@dataclass(frozen=True)
class Setting:
    """The options of a call, which are the same for all its parts.

    All are static except a traced scale: ``sm_scale`` is a Python float, or a traced
    float32 scalar.
    """

    sm_scale: Any
    q_offset: int = 0
    impl: str = "xla"
    interpret: Hashable = False
    config: KernelConfig = field(default_factory=KernelConfig)
    dropout_rate: float = 0.0
    return_state: bool = False


class Outcome(NamedTuple):
    """The result of a term: its output, its log-sum-exp, and its state.

    ``out`` is ``[batch, q_seq, num_q_heads, head_dim_v]``. ``lse`` is the natural
    logarithm of the normaliser, ``[batch, num_q_heads, q_seq]``, or None if a query has
    no single normaliser. A query that sees no key has output 0 and ``lse == -inf``.
    ``state`` is a ``LinearState`` if the call asks for it.
    """

    out: Array
    lse: Array | None
    state: Any = None


QKV: TypeAlias = tuple[Array, Array, Array]
