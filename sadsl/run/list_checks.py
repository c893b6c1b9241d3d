"""Checks lists that a caller gives instead of the choice of a selection."""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array

from lowering.problem import Problem
from pallas_kernels.lists.call import num_blocks
from sadsl.run.options import Options
from sadsl.selections.base import ListShape


def check_lists(arrays: Mapping[str, Array], options: Options) -> None:
    """Checks the lists among the arrays ``[batch or 1, ...]`` of a call.

    Entries are checked where their values are known. Traced entries outside of the
    blocks stand for no block.

    Raises:
      ValueError: a list has the wrong shape, a block twice, or a block that is not
        there.
    """
    for choice in options.selections:
        name = choice.key("listed")
        if name not in arrays:
            continue
        shape = choice.list_shape(options.problem)
        if shape is None:
            raise ValueError(
                f"{name!r} was given, but a list cannot hold the choice of {choice!r}: "
                f"pass {choice.key('chosen')!r}, the same as bools"
            )
        _check_shape(name, arrays[name], shape, options.problem)
        if not isinstance(arrays[name], jax.core.Tracer):
            blocks = num_blocks(options.problem.kv_seq_len, shape.block_kv)
            _check_entries(name, np.asarray(arrays[name]), blocks)


def _check_shape(name: str, x: Array, shape: ListShape, problem: Problem) -> None:
    groups, rows = x.shape[1], shape.rows(problem)
    heads = problem.num_heads
    known = {"shared": (1,), "query": (heads,)}.get(shape.scope, (groups,))
    if x.shape[2] != rows or groups not in known or heads % groups:
        raise ValueError(
            f"{name!r} has shape {x.shape[1:]} without its batch axis: it must be "
            f"(groups, {rows}, blocks), a list for each {shape.block_q} queries, where "
            f"scope={shape.scope!r} says how many of {heads} heads share one"
        )


def _check_entries(name: str, x: np.ndarray, blocks: int) -> None:
    if ((x < 0) | (x > blocks)).any():
        raise ValueError(
            f"{name!r} has entries from {x.min()} to {x.max()}: they must be blocks "
            f"from 0 to {blocks - 1}, or {blocks} where a list ends"
        )
    later = x[..., 1:]
    if not ((later > x[..., :-1]) | (later == blocks)).all():
        raise ValueError(
            f"{name!r} must be ascending without repeats, with {blocks} at its end "
            "where it has fewer blocks: sort each list, and remove repeats"
        )
