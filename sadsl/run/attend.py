"""``attend`` and ``choose``: generic functions with one rule for each kind of term."""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from jaxtyping import Array

from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import Spec, Term, read_by


@singledispatch
def attend(
    term: Spec, inputs: QKV, given: Mapping[str, Any], setting: Setting
) -> Outcome:
    """Computes the output and the lse of ``term``.

    Each file of this wing registers the rule of its kind of term.

    Args:
      term: a map or a term; its class selects the rule.
      inputs: q, k and v, ``[batch, seq, heads, dim]``, checked.
      given: the run-time arrays that ``term`` reads, by name.
      setting: the options of the call.

    Raises:
      ValueError: the arrays, the spec and the options do not fit together.
      NotImplementedError: this backend cannot do it.
    """
    del inputs, given, setting
    raise TypeError(f"{term!r} is not a term that sadsl knows")


@singledispatch
def choose(
    term: Spec,
    inputs: tuple[Array, Array],
    given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:
    """The choices of the selections of ``term`` for q and k, by name.

    A term without its own rule collects the choices of its parts.
    """
    assert isinstance(term, Term)
    found: dict[str, Array] = {}
    for part in term.parts:
        found |= choose(part, inputs, read_by(part, given), setting)
    return found
