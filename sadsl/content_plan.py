"""The plan of one content: which blocks a call visits, for given queries and keys."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lowering.counts import Plan
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.config import KernelConfig, Tile, Tiles
from sadsl import checks
from sadsl.attention import as_term
from sadsl.execution import Options, call_arrays, prepare, with_parts
from sadsl.term import Spec


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
    """Which blocks a call visits for these queries and keys, as the kernels plan it.

    Has one map for each entry of the batch and head whose plans may differ, the heads
    of an entry together; counts are over all of them. Where the call sorts its
    positions by a label, the blocks are those of the sorted order.

    Args:
      spec: a map, ``softmax(map)``, or text.
      q, k: arrays, not traced.
      block_q, block_kv: block sizes.
      operands: the run-time arrays of the call, segment ids by their names among them.
      sm_scale, q_offset: as in ``attention``; selections may depend on them.
      relayout: False keeps the given order of positions.
    """
    problem = checks.problem(q, k, k, q_offset)
    scale = float(q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    config = KernelConfig(relayout=None if relayout else False)
    options = Options(as_term(spec), problem, scale, "xla", config=config)
    arrays = call_arrays(options, operands, (None, None), q.shape[0])
    tile = Tile(block_q=block_q, block_kv=block_kv)
    tiles = Tiles(forward=tile, dq=tile, dkv=tile)
    mask = _forward_mask(q, k, arrays, options=options, tiles=tiles)
    planned = options.arranged(tiles).planned
    return Plan(planned.maps, on_host(mask), problem.num_heads, planned.layouts)


@partial(jax.jit, static_argnames=("options", "tiles"))
def _forward_mask(
    q: Array, k: Array, arrays: Mapping[str, Array], *, options: Options, tiles: Tiles
) -> BlockMask:
    found = with_parts(q, k, arrays, options)
    return prepare(found, options, tiles).masks.forward


def on_host(mask: BlockMask) -> BlockMask:
    """A run-time plan as NumPy arrays, without the room that it did not need."""
    held = jax.tree.map(np.asarray, mask)
    count = int(held.row_ptr[-1])
    names = "run_start", "run_stop", "run_full"
    return replace(held, **{name: getattr(held, name)[:count] for name in names})
