"""What a lowered call will do, in counts, beside dense attention."""

from typing import Any

import numpy as np

from lowering.counts import Plan


def explain(lowered: Any) -> str:
    """Blocks, pairs, FLOPs and bytes of a ``Lowered`` call, as aligned text.

    FLOPs are those of the two matrix products of the forward pass, over whole visited
    blocks; bytes are what reaches the chip if each row of blocks reads its keys and
    values once. "bound" is the speed-up over dense attention that the counts allow.
    """
    q, k, v, _ = lowered.arguments
    batch, q_seq_len, num_q_heads, head_dim = q.shape
    head_dim_v, itemsize = v.shape[3], np.dtype(q.dtype).itemsize
    visited = _visited_per_head(lowered.plan)
    mask = lowered.plan.mask
    tile = mask.block_q * mask.block_kv
    flops = 2 * batch * int(visited.sum()) * tile * (head_dim + head_dim_v)
    pairs = batch * num_q_heads * q_seq_len * k.shape[1]
    dense_flops = 2 * pairs * (head_dim + head_dim_v)
    outer = batch * num_q_heads * q_seq_len * (head_dim + head_dim_v) * itemsize
    inner = (
        batch * int(visited.sum()) * mask.block_kv * (head_dim + head_dim_v) * itemsize
    )
    plan = lowered.plan
    rows = [
        ("spec", repr(lowered.options.term.map)),
        ("target, impl", f"{lowered.target}, {lowered.options.impl}"),
        *plan.rows(),
        ("pairs per map", _pairs_text(plan)),
        ("FLOPs forward", f"{flops:,}"),
        ("FLOPs dense", f"{dense_flops:,}"),
        ("bytes read, written", f"{outer + inner:,}"),
        ("FLOPs per byte", f"{flops / (outer + inner):.1f}"),
        ("bound on speed-up", f"{dense_flops / max(flops, 1):.2f} x over dense"),
    ]
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _pairs_text(plan: Plan) -> str:
    if plan.operands:
        return f"decided at run time by {', '.join(plan.operands)}"
    area = plan.num_blocks * plan.mask.block_q * plan.mask.block_kv
    used = plan.num_pairs / max((plan.num_full + plan.num_partial), 1)
    share = used / (plan.mask.block_q * plan.mask.block_kv)
    return f"{plan.num_pairs:,} of {area:,} ({share:.1%} of the visited blocks)"


def _visited_per_head(plan: Plan) -> np.ndarray:
    """Blocks that each head visits."""
    mask = plan.mask
    lengths = np.asarray(mask.run_stop) - np.asarray(mask.run_start)
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends = total[np.asarray(mask.row_ptr)[:: mask.num_rows]]
    return np.diff(ends)[np.asarray(mask.map_of_head)]
