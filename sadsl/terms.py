"""Terms: how the pairs of a map are scored and normalised."""

from dataclasses import dataclass, fields
from typing import TypeAlias

from sadsl.maps import IndexMap


@dataclass(frozen=True, repr=False)
class Softmax:
    """Softmax over the keys that ``map`` selects: reducer R1, one softmax over the set.

    ``logits_soft_cap`` replaces each scaled score ``s`` by ``cap * tanh(s / cap)``
    (Gemma Team, Gemma 2, 2024, section 2).
    """

    map: IndexMap
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"softmax takes an index map, not {self.map!r}")
        cap = self.logits_soft_cap
        if cap is not None and not cap > 0:
            raise ValueError(
                f"softmax: logits_soft_cap={cap} must be positive, or None"
            )

    def __repr__(self) -> str:
        options = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)[1:]
            if getattr(self, f.name) != f.default
        ]
        return f"softmax({', '.join([repr(self.map), *options])})"


Spec: TypeAlias = IndexMap | Softmax


def softmax(map: IndexMap, logits_soft_cap: float | None = None) -> Softmax:
    """The term of a map with options; a bare map means ``softmax(map)``."""
    return Softmax(map, None if logits_soft_cap is None else float(logits_soft_cap))
