"""Selects pairs by the modality of query and key (MMInference).

Li et al., MMInference: accelerating pre-filling for long-context VLMs via
modality-aware permutation sparse attention, 2025, section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array
from typing_extensions import override

from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection
from sadsl.selections.vertical_slash import labels


@dataclass(frozen=True, repr=False)
class Modalities(NamedSelection):
    """Queries of one modality see keys of another; made by ``modalities``."""

    leak: ClassVar[Leak] = "none"

    queries: int
    keys: int | None = None

    def __post_init__(self) -> None:
        at_least("modalities", "queries", self.queries, 0)
        if self.keys is not None:
            at_least("modalities", "keys", self.keys, 0)

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        return {"modality": 1}

    @property
    @override
    def of_keys(self) -> Mapping[str, int]:
        return {"modality": 0}

    @property
    @override
    def by_token(self) -> bool:
        return True

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Chooses ``queries [batch or 1, queries]`` and ``keys [batch or 1, keys]``."""
        num_keys, start = content.k.shape[2], content.q_offset
        end = start + content.q.shape[2]
        label = labels(content, least=max(num_keys, end))
        parts = {"queries": label[:, start:end] == self.queries}
        if self.keys is not None:
            parts["keys"] = label[:, :num_keys] == self.keys
        return parts

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        query = self.part("queries")[q] == 1
        return query if self.keys is None else query & (self.part("keys")[k] == 1)


def modalities(queries: int, keys: int | None = None) -> Modalities:
    """The queries of one modality see the keys of one modality; other queries see none.

    Li et al., MMInference, 2025, section 4. The operand ``modality``, integers
    ``[length]``, gives the modality of each position.

    Args:
      queries: the modality of the queries, at least 0.
      keys: the modality of the keys; None for all keys.

    Raises:
      ValueError: a modality is negative; in a call, the operand is missing, not of
        integers, or too short.

    Example:
      >>> from sadsl.selections import modalities
      >>> spec = modalities(1, 0)
      >>> parts = {"queries": [0, 0, 1], "keys": [1, 1, 0]}  # of modalities 0 0 1
      >>> operands = {spec.key(name): part for name, part in parts.items()}
      >>> print(spec.dense(3, operands=operands)[0].astype(int))
      [[0 0 0]
       [0 0 0]
       [1 1 0]]
    """
    return Modalities(queries, keys)
