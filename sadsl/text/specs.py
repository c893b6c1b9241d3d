"""What a spec given as a map, a term or a text stands for."""

from sadsl.maps.base import IndexMap
from sadsl.terms import mixtures
from sadsl.terms.base import Spec, Term
from sadsl.terms.softmax import Softmax
from sadsl.text.parsing import parse


def any_term(spec: Spec | str) -> Term:
    """The term that a spec stands for."""
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
    """The one softmax that a spec stands for.

    Raises:
      NotImplementedError: it has several, or scores that are not those of a softmax.
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
      NotImplementedError: no map says that.
    """
    term = any_term(spec)
    if term.seen is None:
        raise NotImplementedError(
            f"spec={term!r} has a part whose pairs no map describes: ask for those of "
            "the other parts"
        )
    return term.seen
