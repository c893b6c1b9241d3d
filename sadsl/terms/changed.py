"""Changes every map of a spec, to limit the pairs of a call or to move its queries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, cast

from sadsl.maps.base import IndexMap
from sadsl.terms.base import Spec, Term
from sadsl.terms.biases import Bias
from sadsl.terms.heads import Heads
from sadsl.terms.latent import Latent
from sadsl.terms.local_linear import LocalLinear
from sadsl.terms.mixtures import Mixture, Weighted
from sadsl.terms.softmax import Softmax


@dataclass(frozen=True)
class Change:
    """What becomes of a map and of a bias; ``asked`` names it in errors.

    ``of_term`` is asked first for each term. It returns None for those that change with
    their parts.
    """

    asked: str
    of_map: Callable[[IndexMap], IndexMap]
    of_bias: Callable[[Bias], Bias] = lambda bias: bias
    of_term: Callable[[Term], Spec | None] = lambda term: None


def changed(spec: Spec, change: Change) -> Spec:
    """The spec with the change in every map and bias.

    Raises:
      NotImplementedError: the spec is no softmax over maps, and no mixture of them.
    """
    return cast(Spec, _changed(spec, change))


def _changed(spec: Spec, change: Change) -> Any:
    own = change.of_term(spec) if isinstance(spec, Term) else None
    return _by_kind(spec, change) if own is None else own


@singledispatch
def _by_kind(spec: Any, change: Change) -> Any:
    raise NotImplementedError(
        f"{change.asked}: {spec!r} cannot take it, which only a softmax over maps and "
        "mixtures of them can: leave it out, or use such a spec"
    )


@_by_kind.register
def _(spec: IndexMap, change: Change) -> IndexMap:
    return change.of_map(spec)


@_by_kind.register
def _(spec: Softmax, change: Change) -> Softmax:
    bias, scale = (
        None if x is None else change.of_bias(x) for x in (spec.bias, spec.scale)
    )
    return replace(spec, map=change.of_map(spec.map), bias=bias, scale=scale)


@_by_kind.register
def _(spec: Mixture, change: Change) -> Mixture:
    return replace(spec, terms=tuple(_changed(part, change) for part in spec.terms))


@_by_kind.register(Latent)
@_by_kind.register(Weighted)
def _(spec: Any, change: Change) -> Any:
    return replace(spec, term=_changed(spec.term, change))


@_by_kind.register
def _(spec: LocalLinear, change: Change) -> LocalLinear:
    return replace(spec, map=change.of_map(spec.map))


@_by_kind.register
def _(spec: Heads, change: Change) -> Heads:
    return Heads(tuple((_changed(part, change), n) for part, n in spec.shares))
