"""``plan`` and ``plan_for``: which blocks a call visits, without running it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lowering import pipeline, planning
from lowering.facts.plan_counts import Plan
from lowering.pipeline import Stages
from lowering.problem import Problem
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import KernelConfig, Tile, Tiles
from sadsl.run import checks
from sadsl.run.content import with_parts
from sadsl.run.kernels import prepare
from sadsl.run.operands import call_arrays
from sadsl.run.options import Options, check_kernel_term
from sadsl.run.types import Setting
from sadsl.terms.base import Spec
from sadsl.text.specs import as_term


def plan_for(
    spec: Spec | str,
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    *,
    block_q: int = 128,
    block_kv: int = 128,
    operands: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    q_offset: int = 0,
    relayout: bool = True,
) -> Plan:
    """Plans a call for given queries and keys: which blocks its kernels visit.

    For maps that content decides; ``plan`` needs no arrays. The plan has one map for
    each batch entry and head whose plans may differ, and counts are over all of them.
    If the call sorts its positions by a label, the blocks are those of the sorted
    order.

    Args:
      spec: a map, ``softmax(map)``, or text.
      q, k: arrays ``[batch, seq, heads, head_dim]``, not traced.
      block_q, block_kv: block sizes, in positions.
      operands: the run-time arrays of the call; segment ids are among them, as
        "q_segment_ids" and "kv_segment_ids".
      sm_scale, q_offset: as in ``attention``; selections may depend on them.
      relayout: False keeps the given order of positions.

    Raises:
      ValueError: the arrays and the spec do not fit together.
      NotImplementedError: the spec has ``scale=`` or ``values=``.

    Example:
      Documents of 4 and 4 tokens, in blocks of 2: causal attention visits 3 of the 4
      blocks of each document, and none between documents.

      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x = jnp.ones((1, 8, 1, 4))
      >>> ids = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]])
      >>> ids = {"q_segment_ids": ids, "kv_segment_ids": ids}
      >>> spec = sa.causal() & sa.segments()
      >>> plan = sa.plan_for(spec, x, x, block_q=2, block_kv=2, operands=ids)
      >>> plan.num_full, plan.num_partial, plan.num_empty
      (2, 4, 10)
    """
    problem = checks.problem(q, k, k, q_offset)
    setting = Setting(
        sm_scale=float(checks.scale(sm_scale, q.shape[-1])),
        q_offset=problem.q_offset,
        config=KernelConfig(relayout=None if relayout else False),
    )
    options = Options(check_kernel_term(as_term(spec), "plan_for"), problem, setting)
    arrays = call_arrays(options, operands, q.shape[0])
    tile = Tile(block_q=block_q, block_kv=block_kv)
    tiles = Tiles(forward=tile, dq=tile, dkv=tile)
    mask = _forward_mask(q, k, arrays, options=options, tiles=tiles)
    planned = options.arranged(tiles).planned
    return Plan(planned.maps, on_host(mask), problem.num_heads, planned.layouts)


@partial(jax.jit, static_argnames=("options", "tiles"))
def _forward_mask(
    q: Array, k: Array, arrays: Mapping[str, Array], *, options: Options, tiles: Tiles
) -> BlockMask:
    """The plan that the forward kernel walks."""
    found = with_parts(q, k, arrays, options)
    return prepare(found, options, tiles).masks.forward


def on_host(mask: BlockMask) -> BlockMask:
    """A run-time plan as NumPy arrays, cut to the runs that it uses."""
    held = jax.tree.map(np.asarray, mask)
    count = int(held.row_ptr[-1])
    names = "run_start", "run_stop", "run_full"
    return replace(held, **{name: getattr(held, name)[:count] for name in names})


def plan(
    spec: Spec | str,
    q_seq_len: int,
    kv_seq_len: int | None = None,
    *,
    block_q: int = 128,
    block_kv: int = 128,
    num_heads: int = 1,
    q_offset: int = 0,
    exact: bool = False,
    relayout: bool = True,
) -> Plan:
    """Plans a spec from its expression: which blocks it visits. No arrays, no jit.

    The plan never misses a pair, and never calls a block full that is not. Interval
    analysis decides most blocks. The others are evaluated, up to a budget; beyond it
    they count as partial, and ``exact=True`` evaluates them all. If another order of
    the positions visits enough fewer blocks to pay for the move, the plan is in that
    order, and ``plan.layouts`` says which.

    Args:
      spec: an index map, a term, or text.
      q_seq_len, kv_seq_len: numbers of queries and keys (``q_seq_len`` if None).
      block_q, block_kv: block sizes in positions, any positive integers.
      num_heads: heads; each distinct map of the heads is planned once.
      q_offset: the position of the first query.
      exact: decide every block, whatever it costs.
      relayout: look for a better order of positions; False keeps the given one.

    Raises:
      ValueError: a size is not a positive integer, or the map is made for another one.
      NotImplementedError: the spec is more than one softmax.

    Example:
      >>> import sadsl as sa
      >>> plan = sa.plan(sa.causal() & sa.window(256), 1024)
      >>> plan.num_full, plan.num_partial, plan.num_empty
      (7, 14, 43)
      >>> plan.num_pairs
      230272
    """
    kv_seq_len = q_seq_len if kv_seq_len is None else kv_seq_len
    sizes = {"q_seq_len": q_seq_len, "kv_seq_len": kv_seq_len, "block_q": block_q}
    sizes |= {"block_kv": block_kv, "num_heads": num_heads}
    checks.positive(sizes)
    problem = Problem(q_seq_len, kv_seq_len, num_heads, q_offset)
    given = pipeline.run(as_term(spec).map.node, problem)
    stages = pipeline.arrange(given, block_q, block_kv) if relayout else given
    return plan_of(stages, given, block_q, block_kv, exact=exact)


def plan_of(
    stages: Stages, given: Stages, block_q: int, block_kv: int, *, exact: bool = False
) -> Plan:
    """The plan of lowered stages, with the counts in the given order beside it."""
    found = _counted(stages, block_q, block_kv, exact)
    if stages.layouts is None:
        return found
    # Only counted: the runs of a poor order may be many millions.
    program = given.planned
    sizes = program.sizes_in(block_q, block_kv)
    counts = [planning.count(node, sizes, exact=exact) for node in program.maps]
    visited, edges = (sum(x) for x in zip(*counts, strict=True))
    return replace(
        found,
        layouts=stages.layouts,
        given=(visited - edges, edges),
        given_maps=program.maps,
    )


def _counted(stages: Stages, block_q: int, block_kv: int, exact: bool) -> Plan:
    # The same positional call as elsewhere, so that all share one cached plan.
    options = (True,) if exact else ()
    mask = pipeline.block_mask(stages, block_q, block_kv, "q", *options)
    return Plan(stages.planned.maps, mask, stages.planned.problem.num_heads)
