"""Converts a spec that is given as a map, a term or a text."""

from sadsl.maps.base import IndexMap
from sadsl.terms import mixtures
from sadsl.terms.base import Spec, Term
from sadsl.terms.softmax import Softmax
from sadsl.text.parsing import parse


def any_term(spec: Spec | str) -> Term:
    """The term of a spec; a map means ``softmax(map)``.

    Raises:
      TypeError: it is not a spec.

    Example:
      >>> any_term("causal()")
      softmax(causal())
    """
    if isinstance(spec, str):
        spec = parse(spec)
    if isinstance(spec, IndexMap):
        return Softmax(spec)
    if isinstance(spec, Term):
        return spec
    raise TypeError(
        f"spec={spec!r} must be an index map, a term such as softmax(map, ...), or the "
        "text of one"
    )


def as_term(spec: Spec | str) -> Softmax:
    """The only softmax of a spec.

    Raises:
      NotImplementedError: the spec has several, or other kinds of terms.
    """
    term = any_term(spec)
    if isinstance(term, Softmax):
        return term
    found = mixtures.one_softmax(term)
    if found is not None:
        return found
    raise NotImplementedError(
        f"spec={term!r} is more than one softmax over a map, and this takes a map or "
        "softmax(map, ...): ask it of a part; joint(...).resolved(n) are those of a "
        "joint"
    )


def map_of(spec: Spec | str) -> IndexMap:
    """The pairs on which the output of a spec depends, as one map.

    Raises:
      NotImplementedError: no map describes the pairs of a part.

    Example:
      >>> import sadsl as sa
      >>> map_of(sa.joint(sa.window(2), sa.sinks(1)))
      window(2) | sinks(1)
    """
    term = any_term(spec)
    if term.seen is None:
        raise NotImplementedError(
            f"spec={term!r} has a part whose pairs no map describes: ask for the map "
            "of another part"
        )
    return term.seen
