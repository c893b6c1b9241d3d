"""Checks the run-time arrays of a call against the operands that its spec reads."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowering import ir
from lowering.bias.verify import verify_scores
from lowering.pipeline import Stages
from lowering.ranges import verify
from sadsl.maps.integers import integers
from sadsl.run.list_checks import check_lists
from sadsl.run.options import Options
from sadsl.selections.base import Selection, operands_of


def call_arrays(
    options: Options, operands: Mapping[str, Any] | None, batch: int
) -> dict[str, Array]:
    """The run-time arrays of a call, checked, each ``[batch or 1, ...]``.

    Raises:
      ValueError: an array is missing, unknown, or has the wrong shape or dtype.
    """
    arrays = operand_arrays(operands, floats=frozenset(options.asked))
    ranks = operand_ranks(options, arrays)
    fitted = with_batch_axis(arrays, ranks, batch)
    check_given(fitted, options)
    check_lists(fitted, options)
    return fitted


def check_given(arrays: Mapping[str, Any], options: Options) -> None:
    """Checks the arrays of a caller, except those that selections check or make.

    Raises:
      ValueError: an array is missing, unknown, or has the wrong shape.
    """
    chosen = options.selections
    known = {*options.asked, *options.of_bias, *operands_of(options.term.map)}
    if options.score is not None:
        shapes = {n: x.shape[1:] for n, x in arrays.items() if n in options.of_bias}
        verify_scores(options.score, options.problem, shapes)
    mine = {
        name: x
        for name, x in arrays.items()
        if name in options.read or name not in known
        if not any(s.owns(name) for s in chosen)
    }
    check_operands(mine, options.stages, made=chosen)


def operand_ranks(options: Options, arrays: Mapping[str, Any]) -> dict[str, int]:
    """The number of axes of each array beside the batch: the number of its indices.

    The map counts as it was written. Simplification may remove the part that reads an
    array, and a caller may still pass that array. An array that nothing reads is
    refused later.
    """
    unread = {name: x.ndim for name, x in arrays.items()}
    written = operands_of(options.term.map)
    lists = {s.key("listed"): 3 for s in options.selections}
    return {**unread, **lists, **written, **options.asked, **options.of_bias}


def check_operands(
    arrays: Mapping[str, Any], stages: Stages, made: tuple[Selection, ...] = ()
) -> None:
    """Checks arrays ``[batch or 1, ...]`` against the operands of the simplified map.

    The arrays that the selections ``made`` will choose may still be missing.

    Raises:
      ValueError: an array is missing, unknown, or has the wrong shape.
    """
    program = stages["simplify"]
    problem = program.problem
    shapes = {name: tuple(x.shape[1:]) for name, x in arrays.items()}
    needed = {
        n
        for node in program.maps
        for n in ir.walk(node)
        if isinstance(n, ir.Operand) and not any(s.owns(n.name) for s in made)
    }
    lengths = problem.q_seq_len, problem.kv_seq_len
    verify.verify_operands(needed, *lengths, shapes, problem.num_heads)


def operand_arrays(
    operands: Mapping[str, Any] | None, *, floats: frozenset[str] = frozenset()
) -> dict[str, jax.Array]:
    """The run-time arrays of a call by name, as int32 or bool.

    Those named in ``floats``, which selections and biases read, keep their dtype.

    Raises:
      ValueError: another array does not hold integers.
    """
    return {
        name: jnp.asarray(x) if name in floats else integers(name, x)
        for name, x in (operands or {}).items()
    }


def with_batch_axis(
    arrays: Mapping[str, jax.Array], ranks: Mapping[str, int], batch: int
) -> dict[str, jax.Array]:
    """Each array as ``[batch or 1, ...]``; ``ranks`` do not count the batch axis.

    Raises:
      ValueError: an array has another rank, or its first axis is not the batch.
    """
    found = {}
    for name, x in arrays.items():
        rank = ranks.get(name, 1)
        if x.ndim == rank:
            found[name] = x[None]
        elif x.ndim == rank + 1 and x.shape[0] in (1, batch):
            found[name] = x
        else:
            raise ValueError(
                f"operand {name!r} has shape {x.shape}: it must have {rank} axes, or a "
                f"batch axis of {batch} (or 1) in front of them"
            )
    return found
