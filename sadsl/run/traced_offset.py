"""A ``q_offset`` that is an array: the position is a run-time operand of the maps.

The plan of such a call is made at run time, from the value of the operand: the same
program serves every position.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from lowering import ir
from lowering.bias import nodes
from sadsl.maps.base import IndexMap
from sadsl.maps.integers import integers
from sadsl.maps.numbers import Real
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import selections_of
from sadsl.terms.base import DROPOUT_KEY, Term, reads
from sadsl.terms.biases import Bias
from sadsl.terms.changed import Change, changed
from sadsl.text.specs import any_term

NAME = "q_offset"
POSITION = ir.Operand(NAME, ())


@dataclass(frozen=True, repr=False)
class Moved(IndexMap):
    """A map whose queries begin at the position that the operand holds."""

    a: IndexMap

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(ir.shift_queries(self.a.node, POSITION))

    @override
    def __repr__(self) -> str:
        return repr(self.a)


@dataclass(frozen=True, repr=False)
class MovedBias(Bias):
    """A bias whose queries begin at the position that the operand holds."""

    a: Bias

    @override
    def of_heads(self, num_heads: int) -> Real:
        """The number of a pair; see ``Bias``."""
        score = self.a.score(num_heads)
        return Real(nodes.with_indices(score, lambda i: ir.shift_queries(i, POSITION)))

    @override
    def __repr__(self) -> str:
        return repr(self.a)


def is_traced(q_offset: Any) -> bool:
    """Whether an offset is an array instead of a Python or NumPy integer."""
    return not isinstance(q_offset, bool | int | np.integer | float | str)


def with_offset(
    spec: Term, q_offset: Any, given: Mapping[str, Any], batch: int
) -> tuple[Term, dict[str, Any]]:
    """The spec with queries from ``q_offset`` on, and the arrays that it reads.

    Raises:
      ValueError: the offset is not a scalar or ``[batch]``, is known and negative, or
        the call has an operand of its name.
      TypeError: the offset does not hold integers.
      NotImplementedError: the spec has a part that takes no such offset, or the call
        has dropout.
    """
    if NAME in given:
        raise ValueError(
            f"operands has {NAME!r}, the name of a position that is an array: give "
            "the operand another name"
        )
    at = jnp.asarray(q_offset)
    if at.shape not in ((), (batch,)):
        raise ValueError(
            f"q_offset has shape {at.shape}: it must be one integer, or one for each "
            f"of the {batch} batch entries"
        )
    if not jnp.issubdtype(at.dtype, jnp.integer):
        raise TypeError(f"q_offset has dtype {at.dtype}: it must hold integers")
    if not isinstance(at, jax.core.Tracer) and np.any(np.asarray(at) < 0):
        raise ValueError(f"q_offset={np.asarray(at)} must be at least 0")
    found = _moved(spec)
    if not reads(found, NAME):
        # Maps without queries, such as full(), read no position.
        return found, dict(given)
    if DROPOUT_KEY in given:
        raise NotImplementedError(
            "q_offset is an array, and dropout follows from positions that are known: "
            "pass a Python integer, or dropout_rate=0"
        )
    return found, {**given, NAME: integers(NAME, at)}


def _moved(spec: Term) -> Term:
    """The spec with queries that begin at the operand."""
    return any_term(
        changed(spec, Change("q_offset is an array", _moved_map, MovedBias))
    )


def _moved_map(pairs: IndexMap) -> IndexMap:
    if chosen := selections_of(pairs):
        raise NotImplementedError(
            f"q_offset is an array, and {chosen[0]!r} chooses for queries whose "
            "positions are known: pass an integer, or choose first with sadsl.select"
        )
    return Moved(pairs)
