"""Choices that depend on one token each: their parts are kept as keys are.

A bucket, a cluster or a modality belongs to a token, so it is found once, when the
token is new. Choices that compare keys are made anew for each query.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from sadsl.maps.base import IndexMap
from sadsl.run.heads import slices
from sadsl.selections.base import Content, Selection, selections_of
from sadsl.terms.base import Spec, Term
from sadsl.terms.heads import Heads


def token_choices(
    term: Spec, inputs: tuple[Array, Array]
) -> Iterator[tuple[Selection, tuple[Array, Array]]]:
    """The selections of a spec whose parts belong to tokens, with their q and k."""
    if isinstance(term, IndexMap):
        for choice in selections_of(term):
            if choice.by_token:
                yield choice, inputs
    elif isinstance(term, Heads):
        for own, part in slices(inputs, term):
            yield from token_choices(part, (own[0], own[1]))
    elif isinstance(term, Term):
        for part in term.parts:
            yield from token_choices(part, inputs)


def token_parts(
    term: Spec,
    inputs: tuple[Array, Array],
    given: Mapping[str, Any],
    earlier: Mapping[str, Array],
    there: Bool[Array, "batch_or_1 slots"],
) -> dict[str, Array]:
    """The parts of new tokens, by name.

    Args:
      term: the spec.
      inputs: q and k of the new tokens, ``[batch, seq, heads, dim]``.
      given: the arrays of the call.
      earlier: the parts of earlier keys, by slot.
      there: which slots hold a key.
    """
    found: dict[str, Array] = {}
    for choice, (q, k) in token_choices(term, inputs):
        arrays = {
            name: _with_batch(given[name], rank)
            for name, rank in choice.operands.items()
            if name in given
        }
        q, k = (jnp.swapaxes(x, 1, 2) for x in (q, k))
        content = Content(q, k, arrays, 1.0)
        own = {n.removeprefix(choice.key("")): x for n, x in earlier.items()
               if choice.owns(n)}  # fmt: skip
        made = choice.choose_after(content, own, there)
        found |= {choice.key(name): x for name, x in made.items()}
    return found


def _with_batch(x: Any, rank: int) -> Array:
    x = jnp.asarray(x)
    return x[None] if x.ndim == rank else x
