"""Runs ``heads``: one call for each range of heads."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from sadsl.run import dropout_seeds, merging
from sadsl.run.attend import attend, choose
from sadsl.run.types import QKV, Outcome, Setting
from sadsl.terms.base import Spec, read_by
from sadsl.terms.heads import Heads


def slices(
    inputs: tuple[Array, ...], term: Heads
) -> list[tuple[tuple[Array, ...], Spec]]:
    """Splits the arrays by heads: for each part its arrays and its spec.

    ``inputs`` are q and others that have the heads of k, ``[batch, seq, heads, dim]``.

    Raises:
      ValueError: the numbers do not add up to the heads of q, or split a group of heads
        that share a key head.
    """
    q, *others = inputs
    heads, group = q.shape[2], q.shape[2] // others[0].shape[2]
    if term.num_heads != heads:
        raise ValueError(
            f"{term!r} is for {term.num_heads} heads, and q has {heads}: make the "
            "numbers add up to the heads of q"
        )
    found, start = [], 0
    for spec, count in term.shares:
        if count % group:
            raise ValueError(
                f"{term!r}: {count} heads of {spec!r} split a group of {group} heads "
                f"that share a key head: give a multiple of {group}"
            )
        stop = start + count
        mine = tuple(x[:, :, start // group : stop // group] for x in others)
        found.append(((q[:, :, start:stop], *mine), spec))
        start = stop
    return found


@attend.register
def _(term: Heads, inputs: QKV, given: Mapping[str, Any], setting: Setting) -> Outcome:
    """The outcomes of all parts, joined along the heads; an lse if all have one."""
    found = []
    for i, ((q, k, v), spec) in enumerate(slices(inputs, term)):
        # With one key, the first heads of all parts would drop the same pairs.
        mine = dropout_seeds.of_part(read_by(spec, given), i)
        found.append(attend(spec, (q, k, v), mine, setting))
    return merging.beside(found)


@choose.register
def _(
    term: Heads,
    inputs: tuple[Array, Array],
    given: Mapping[str, Any],
    setting: Setting,
) -> dict[str, Array]:
    """The choices of the selections of all parts, each for its own heads.

    Raises:
      ValueError: two parts have the same selection, so that their arrays share a name.
    """
    found: dict[str, Array] = {}
    for (q, k), spec in slices(inputs, term):
        made = choose(spec, (q, k), read_by(spec, given), setting)
        twice = sorted(set(found) & set(made))
        if twice:
            raise ValueError(
                f"{term!r} chooses {twice[0]!r} for two parts: give their operands "
                "different names, so that the selections differ"
            )
        found |= made
    return found
