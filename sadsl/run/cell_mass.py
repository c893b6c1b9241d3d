"""``cell_mass``: the largest attention weight in each cell, from the lse of a call."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering.problem import Problem
from sadsl.maps.base import IndexMap
from sadsl.run import checks
from sadsl.selections.cell_scores import in_steps, products
from sadsl.selections.static_cells import of_heads, pairs_at
from sadsl.selections.tiles import grouped, positions


def cell_mass(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    lse: Float[Array, "batch num_q_heads q_seq"],
    map: IndexMap,
    *,
    block: int = 64,
    sm_scale: float | None = None,
) -> Float[Array, "batch num_q_heads q_blocks kv_blocks"]:
    """The largest weight of the pairs in each cell of ``block`` queries and keys.

    As in ``key_mass``, the weights are those of the call that returned ``lse``, so a
    cell is computed by itself: some queries and some keys are in memory at a time, and
    no matrix of all pairs. No gradient flows to q, k and lse.

    Args:
      q, k, lse, sm_scale: of the call.
      map: its map, without selections.
      block: positions of a block.

    Returns:
      float32; 0 for a cell without a pair.

    Raises:
      ValueError: the shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> x = jnp.zeros((1, 4, 1, 8))
      >>> _, lse = sa.attention(x, x, x, sa.causal(), return_lse=True)
      >>> cell_mass(x, x, lse, sa.causal(), block=2)[0, 0].round(3).tolist()
      [[1.0, 0.0], [0.3330000042915344, 0.3330000042915344]]
    """
    problem = checks.problem(q, k, k, 0)
    batch, length, heads, _ = q.shape
    if lse.shape != (batch, heads, length):
        raise ValueError(
            f"cell_mass: lse has shape {lse.shape}: it must be {(batch, heads, length)}"
        )
    scale = checks.scale(sm_scale, q.shape[-1])
    scale = scale if isinstance(scale, float) else scale.astype(jnp.float32)
    q, k, lse = (x.astype(jnp.float32) for x in jax.lax.stop_gradient((q, k, lse)))
    rows, columns = (_side(x, block) for x in (q, k))
    rows["lse"] = grouped(lse, block, -1)[0]
    each = batch * heads * block

    def of_rows(x: Any) -> Float[Array, "batch heads rows columns"]:
        def of_columns(y: Any) -> Float[Array, "batch heads columns rows"]:
            return jnp.swapaxes(_largest(x, y, scale, map, problem), 2, 3)

        cost = each * block * x["at"].shape[2]
        return jnp.swapaxes(in_steps(of_columns, columns, cost), 2, 3)

    return in_steps(of_rows, rows, each * k.shape[1])


def _side(x: Float[Array, "batch seq heads dim"], block: int) -> dict[str, Array]:
    """Vectors and positions by block, ``[batch or 1, heads or 1, blocks, block, ...]``.

    Those behind the end have position -1.
    """
    at, real = positions(block, x.shape[1])
    place = jnp.where(real, at, -1).astype(jnp.int32)
    return {"x": grouped(jnp.swapaxes(x, 1, 2), block, -2)[0], "at": place[None, None]}


def _largest(
    rows: Any, columns: Any, scale: Any, map: IndexMap, problem: Problem
) -> Float[Array, "batch heads rows columns"]:
    """The largest weight in each cell of some rows and some columns."""
    q, k = (
        x["x"].reshape(*x["x"].shape[:2], -1, x["x"].shape[-1]) for x in (rows, columns)
    )
    at_q, at_k = rows["at"].reshape(-1, 1), columns["at"].reshape(1, -1)
    real = (at_q >= 0) & (at_k >= 0)
    held = (pairs_at(of_heads(map, problem), at_q, at_k, problem) & real[None])[None]
    lse = rows["lse"].reshape(*q.shape[:3], 1)
    some = ~jnp.isneginf(lse)
    s = products(q, k) * scale - jnp.where(some, lse, 0.0)
    p = jnp.where(held & some, jnp.exp(s), 0.0)
    sizes = *rows["at"].shape[2:], *columns["at"].shape[2:]
    return p.reshape(*p.shape[:2], *sizes).max(axis=(3, 5))
