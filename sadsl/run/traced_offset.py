"""A ``q_offset`` that is an array: the position is a run-time operand of the maps.

The plan of such a call is made at run time, from the value of the operand: the same
program serves every position.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sadsl.maps.base import IndexMap
from sadsl.maps.integers import integers
from sadsl.selections.base import selections_of
from sadsl.terms.base import DROPOUT_KEY, Term, reads
from sadsl.terms.changed import Change, changed
from sadsl.terms.moved import FROM_OFFSET, OFFSET, Moved, MovedBias, PairPlaces
from sadsl.text.specs import any_term


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
    if OFFSET in given:
        raise ValueError(
            f"operands has {OFFSET!r}, the name of a position that is an array: give "
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
    found = moved(spec, given)
    if not reads(found, OFFSET):
        # Maps without queries, such as full(), read no position.
        return found, dict(given)
    if DROPOUT_KEY in given:
        raise NotImplementedError(
            "q_offset is an array, and dropout follows from positions that are known: "
            "pass a Python integer, or dropout_rate=0"
        )
    return found, {**given, OFFSET: integers(OFFSET, at)}


def moved(spec: Term, given: Mapping[str, Any], at: PairPlaces = FROM_OFFSET) -> Term:
    """The spec with queries and keys at the places that operands hold.

    Raises:
      NotImplementedError: a part takes no such places, or as for ``moved_map``.
    """
    change = Change(
        "q_offset is an array",
        lambda pairs: moved_map(pairs, given, at),
        lambda bias: MovedBias(bias, at),
    )
    return any_term(changed(spec, change))


def moved_map(
    pairs: IndexMap, given: Mapping[str, Any], at: PairPlaces = FROM_OFFSET
) -> IndexMap:
    """A map with queries and keys at the places that operands hold.

    Raises:
      NotImplementedError: it chooses for more than a query at a time, and its choice is
        not ``given``.
    """
    for choice in selections_of(pairs):
        if not choice.by_position and not any(map(choice.owns, given)):
            raise NotImplementedError(
                f"q_offset is an array, and {choice!r} does not choose for each query "
                "alone: pass an integer, choose first with sadsl.select, or give it "
                "block_q=1"
            )
    return Moved(pairs, at)
