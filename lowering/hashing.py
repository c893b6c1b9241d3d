"""Values that compute their hash once: nodes and long tables are keys of many caches.

A frozen dataclass hashes all that it holds each time it is asked, an expression thus
all of its parts, and a table all of its entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T", bound="Hashed")


class Hashed:
    """What ``node`` makes of a class; ``_hash`` is unset until it is asked for."""

    __slots__ = ("_hash",)
    _hash: int


@dataclass_transform(frozen_default=True)
def node(of: type[T]) -> type[T]:
    """A frozen dataclass with slots that computes its hash once."""
    made = dataclass(frozen=True, slots=True)(of)
    compute = made.__hash__

    def __hash__(self: T) -> int:
        try:
            return self._hash
        except AttributeError:
            found = compute(self)
            object.__setattr__(self, "_hash", found)
            return found

    made.__hash__ = __hash__  # type: ignore[method-assign]
    return made


class TableEntries(tuple[int, ...]):
    """The entries of a table: a tuple that computes its hash once."""

    _hash: int

    @classmethod
    def of(cls, values: Iterable[int]) -> "TableEntries":
        """``values`` themselves if they are entries already."""
        return values if isinstance(values, cls) else cls(values)

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self),)
