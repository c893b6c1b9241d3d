"""``heads``: every part of the heads is a call of its own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowering import ir
from sadsl import routing
from sadsl.selections.content import selections_of
from sadsl.terms import Heads, ScatterMean, Softmax, Spec


def reads(spec: Spec, name: str) -> bool:
    """Whether a call with ``spec`` takes the run-time array ``name``."""
    match spec:
        case Heads(parts):
            return any(reads(part, name) for part, _ in parts)
        case ScatterMean():
            return routing.reads(spec, name)
        case Softmax(map):
            return reads(map, name)
    chosen = selections_of(spec)
    asked = any(name in s.operands or s.owns(name) for s in chosen)
    return asked or name in ir.operand_names(spec.node)


def slices(
    inputs: tuple[Array, ...], term: Heads
) -> list[tuple[tuple[Array, ...], Spec]]:
    """The heads of every part, of q and of what has the heads of k.

    Raises:
      ValueError: the numbers do not add up to the heads, or split a group of them.
    """
    q, *others = inputs
    heads, group = q.shape[2], q.shape[2] // others[0].shape[2]
    if term.num_heads != heads:
        raise ValueError(
            f"{term!r} is for {term.num_heads} heads, and q has {heads}: make the "
            "numbers add up to the heads of q"
        )
    found, start = [], 0
    for spec, count in term.parts:
        if count % group:
            raise ValueError(
                f"{term!r}: {count} heads of {spec!r} split a group of {group} that "
                "reads one key head: give a multiple of it"
            )
        stop = start + count
        mine = tuple(x[:, :, start // group : stop // group] for x in others)
        found.append(((q[:, :, start:stop], *mine), spec))
        start = stop
    return found


def attention(
    inputs: tuple[Array, Array, Array],
    term: Heads,
    given: Mapping[str, Any],
    attend: Callable[..., Any],
) -> tuple[Array, Array] | Array:
    """Output of all parts, with the lse if ``attend`` returns it as well.

    ``attend(q, k, v, spec, operands=...)`` is ``sadsl.attention.attention`` with the
    options of the call.

    Raises:
      ValueError: no part reads an array, or the numbers of heads do not fit.
    """
    found = [
        attend(*mine, spec, operands={n: x for n, x in given.items() if reads(spec, n)})
        for mine, spec in slices(inputs, term)
    ]
    check_read(given, term)
    if isinstance(found[0], tuple):
        outs, lses = zip(*found, strict=True)
        return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=1)
    return jnp.concatenate(found, axis=2)


def select(
    inputs: tuple[Array, Array],
    term: Heads,
    given: Mapping[str, Any],
    choose: Callable[..., dict[str, Array]],
) -> dict[str, Array]:
    """What the selections of all parts choose; ``choose`` is ``select`` with options.

    Raises:
      ValueError: two parts have the same selection, whose arrays have one name.
    """
    check_read(given, term)
    found: dict[str, Array] = {}
    for mine, spec in slices(inputs, term):
        mine_given = {n: x for n, x in given.items() if reads(spec, n)}
        made = choose(spec, *mine, operands=mine_given)
        twice = sorted(set(found) & set(made))
        if twice:
            raise ValueError(
                f"{term!r} chooses {twice[0]!r} for two parts: give their operands "
                "different names, so that the selections differ"
            )
        found |= made
    return found


def check_read(given: Mapping[str, Any], term: Heads) -> None:
    """Refuses arrays that no part reads."""
    for name in given:
        if not reads(term, name):
            raise ValueError(
                f"{name!r} was given, but no part of {term!r} reads it: drop it"
            )
