"""Queries of one modality that see the keys of another.

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
    """See ``modalities``."""

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

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        """Bools ``queries [batch or 1, queries]`` and ``keys [batch or 1, keys]``."""
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
    """The queries of modality ``queries`` see the keys of modality ``keys``, or all.

    ``operands={"modality": ints [batch or 1, length]}`` names the modality of each
    position. With 0 0 1 1, ``modalities(1, 0)``::

        ....
        ....
        ##..
        ##..
    """
    return Modalities(queries, keys)
