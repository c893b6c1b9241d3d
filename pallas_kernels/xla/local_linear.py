"""Local linear attention over the blocks of a plan, with its gradient.

For one query with the weights ``p_j`` of a softmax::

    mean = sum p_j k_j     C = sum p_j u_j u_j^T     with u_j = k_j - mean
    (C + ridge I) x = at - mean
    o = sum p_j (1 + X_j) v_j                        with X_j = u_j . x

and for a cotangent ``do``, with ``g_j = do . v_j`` and ``b = sum p_j g_j``::

    h = sum p_j u_j g_j     (C + ridge I) y = h      Y_j = u_j . y
    delta = b + h . x - y . (at - mean - ridge x) - dlse
    ds_j = p_j ((g_j - Y_j) (1 + X_j) - b X_j - delta)
    dq = sum ds_j k_j                                d at = y      d ridge = -x . y
    dk_j = ds_j q + p_j ((g_j - b - Y_j) x - (1 + X_j) y)
    dv_j = p_j (1 + X_j) do

The systems of all queries of a row of blocks are solved at once. Memory is linear in
the lengths. The second derivative goes through ``dense``.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels import dense
from pallas_kernels.call import Call, Inputs, Masks, Vectors
from pallas_kernels.solve import Accuracy
from pallas_kernels.varying import alike, vary
from pallas_kernels.xla import tile
from pallas_kernels.xla.backward import add_keys
from pallas_kernels.xla.forward import forward as softmax_forward
from pallas_kernels.xla.heads import HeadGroup
from pallas_kernels.xla.local_linear_rows import (
    GroupArrays,
    KeyTile,
    OfQueries,
    dot,
    group_arrays,
    numbers,
    over_heads,
    vectors,
)
from pallas_kernels.xla.rows import Blocks, each_row
from pallas_kernels.xla.walk_types import XlaLists, XlaPlan
from pallas_kernels.xla.walks import lists_of


class Points(NamedTuple):
    """The arrays of a call, in the dtype of their sums.

    ``at`` is where a query reads its regression, in the space of the keys. ``inputs.q``
    makes the scores.
    """

    inputs: Inputs
    at: Float[Array, "batch q_heads q head_dim"]
    ridge: Float[Array, "batch q_heads q"]


class Fit(NamedTuple):
    """The results, and what the gradient keeps of them.

    ``residual`` is ``|at - mean - (C + ridge I) x| / |at - mean|``. Where it misses the
    tolerance, ``x`` and ``o`` are NaN. A query that sees no key has ``o == 0``,
    ``residual == 0`` and ``lse == -inf``.
    """

    o: Float[Array, "batch q_heads q head_dim_v"]
    lse: Float[Array, "batch q_heads q"]
    residual: Float[Array, "batch q_heads q"]
    mean: Float[Array, "batch q_heads q head_dim"]
    total: Float[Array, "batch q_heads q"]  # of pallas_kernels.call.Kept
    x: Float[Array, "batch q_heads q head_dim"]


class FitCotangents(NamedTuple):
    """The cotangents of the results that have a gradient."""

    o: Float[Array, "batch q_heads q head_dim_v"]
    lse: Float[Array, "batch q_heads q"]


def attend(
    points: Points, of_pairs: Vectors, masks: Masks, call: Call, accuracy: Accuracy
) -> tuple[Array, Array, Array]:
    """Outputs, lse and residuals over the blocks of ``masks``.

    The first two have gradients, in reverse mode. It works under ``jit``, ``vmap``,
    ``jax.checkpoint`` and ``shard_map``.
    """
    lists, tests = lists_of(masks), masks.forward.test_of_head
    args = alike((points, of_pairs, tests, lists))
    return _attend(call, accuracy, *args)[:3]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    call: Call, accuracy: Accuracy, points: Points, of_pairs: Vectors, tests: Any,
    lists: XlaLists,
) -> Fit:  # fmt: skip
    del tests
    return forward(points, of_pairs, lists, call, accuracy)


def _attend_fwd(
    call: Call, accuracy: Accuracy, points: Points, *plans: Any
) -> tuple[Fit, Any]:
    fit = _attend(call, accuracy, points, *plans)
    # The names that checkpoint policies know from softmax attention.
    names = ("attn_lse" if x.ndim == 3 else "attn_out" for x in fit)
    fit = Fit(*map(checkpoint_name, fit, names))
    return fit, (points, fit, plans)


def _attend_bwd(call: Call, accuracy: Accuracy, residuals: Any, cotangent: Fit) -> Any:
    points, fit, plans = residuals
    cotangents = vary(FitCotangents(*cotangent[:2]), points.at)
    found = _backward(call, accuracy, points, fit, cotangents, *plans)
    return found, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _backward(
    call: Call, accuracy: Accuracy, points: Points, fit: Fit,
    cotangents: FitCotangents, of_pairs: Vectors, tests: Any, lists: XlaLists,
) -> Points:  # fmt: skip
    del tests
    return backward(points, fit, cotangents, of_pairs, lists, call, accuracy)


def _backward_fwd(
    call: Call, accuracy: Accuracy, points: Points, fit: Fit,
    cotangents: FitCotangents, *plans: Any,
) -> tuple[Points, Any]:  # fmt: skip
    found = _backward(call, accuracy, points, fit, cotangents, *plans)
    return found, (points, fit, cotangents, plans)


def _backward_bwd(call: Call, accuracy: Accuracy, residuals: Any, moved: Any) -> Any:
    points, fit, cotangents, (of_pairs, tests, _) = residuals

    def twin(points: Points, cotangents: FitCotangents) -> Points:
        def results(points: Points) -> FitCotangents:
            q, k, _ = points.inputs
            pairs = dense.allowed(of_pairs, tests, q.shape, k.shape[2], call)
            found = dense.local_linear(*points, pairs, call.sm_scale, accuracy)
            return FitCotangents(*found[:2])

        return jax.vjp(results, points)[1](cotangents)[0]

    # The fit is a function of the points, and the twin computes it anew from them.
    of_points, of_cotangents = jax.vjp(twin, points, cotangents)[1](moved)
    nothing = jax.tree.map(jnp.zeros_like, fit)
    return of_points, nothing, of_cotangents, None, None, None


_backward.defvjp(_backward_fwd, _backward_bwd)


def forward(
    points: Points, of_pairs: Vectors, lists: XlaLists, call: Call, accuracy: Accuracy
) -> Fit:
    """The first formulas of the module, over the blocks of ``lists.forward``."""
    q, k, v = points.inputs
    # The mean key is the output of a softmax whose values are the keys.
    mean, lse, total = softmax_forward(Inputs(q, k, k), of_pairs, lists, call)
    lengths = q.shape[2], k.shape[2]

    def run(
        inputs: Inputs, queries: OfQueries, of_pairs: Vectors, plan: XlaPlan,
        heads: HeadGroup,
    ) -> tuple[Any, Any]:  # fmt: skip
        arrays = group_arrays(inputs, queries, plan, heads, call)
        pairs = tile.pairs_of(call, of_pairs, heads, plan, lengths)

        def of_row(total: Any, at: Array, blocks: Blocks) -> Any:
            row = arrays.row(at, blocks)
            x, residual = row.solved(row.at - row.mean, accuracy)

            def add(sums: tuple[Array, Array], keys: KeyTile) -> tuple[Array, Array]:
                weights = keys.p * (1 + row.along(keys, x))
                o = sums[0] + dot(weights, arrays.values(keys), (1, 0))
                return o, sums[1] + weights.sum(axis=-1, keepdims=True)

            o = jnp.zeros((*x.shape[:-1], v.shape[-1]), x.dtype)
            o, every = row.fold(add, vary((o, jnp.zeros_like(residual)), x))
            # The weights add up to 1 but for the rounding of a long x.
            o = o / jnp.where(row.some, every, 1.0)
            return (
                tile.put_queries(total[0], o, at),
                tile.put_queries(total[1], x, at),
                tile.put_row(total[2], residual[..., 0], at),
            )

        like = arrays.blocks.q
        o = jnp.zeros((*like.shape[:-1], v.shape[-1]), like.dtype)
        start = o, jnp.zeros_like(like), jnp.zeros_like(arrays.queries.lse)
        walk = plan.walks[heads.map_index]
        o, x, residual = each_row(walk, pairs, of_row, vary(start, like))
        o, x = (tile.heads_first(y, lengths[0]) for y in (o, x))
        return (o, x, _of_heads(residual, lengths[0])), ()

    queries = OfQueries(points.at, mean, lse, total, points.ridge)
    args = points.inputs, queries, of_pairs, lists, lists.forward
    (o, x, residual), _ = over_heads(run, *args)
    return Fit(o, lse, residual, mean, total, x)


class FitGradients(NamedTuple):
    """The gradients of a head group in blocks."""

    dq: Float[Array, "batch q_blocks block_q q_heads head_dim"]
    dat: Float[Array, "batch q_blocks block_q q_heads head_dim"]
    dridge: Float[Array, "batch kv_heads group q_blocks block_q"]
    dk: Float[Array, "batch kv_heads kv_blocks head_dim block_kv"]
    dv: Float[Array, "batch kv_heads kv_blocks head_dim_v block_kv"]


def backward(
    points: Points, fit: Fit, cotangents: FitCotangents, of_pairs: Vectors,
    lists: XlaLists, call: Call, accuracy: Accuracy,
) -> Points:  # fmt: skip
    """The gradients of ``points``, over the blocks of ``lists.backward``."""
    q, k, _ = points.inputs
    lengths = q.shape[2], k.shape[2]

    def run(
        inputs: Inputs, queries: Any, of_pairs: Vectors, plan: XlaPlan,
        heads: HeadGroup,
    ) -> tuple[Any, Any]:  # fmt: skip
        queries, (x, do), dlse = queries
        arrays = group_arrays(inputs, queries, plan, heads, call)
        pairs = tile.pairs_of(call, of_pairs, heads, plan, lengths)
        held = vectors(x, heads, plan), vectors(do, heads, plan)
        dlse = numbers(dlse, heads, plan)

        def of_row(total: FitGradients, at: Array, blocks: Blocks) -> FitGradients:
            return _add_row(total, at, blocks, arrays, (*held, dlse), accuracy)

        like, blocks = arrays.blocks.q, arrays.blocks
        start = FitGradients(
            jnp.zeros_like(like), jnp.zeros_like(like),
            jnp.zeros_like(arrays.queries.lse),
            *(
                jnp.zeros((b, h, n, d, size), like.dtype)
                for b, n, size, h, d in (blocks.k.shape, blocks.v.shape)
            ),
        )  # fmt: skip
        walk = plan.walks[heads.map_index]
        total = each_row(walk, pairs, of_row, vary(start, like))
        dq, dat = (tile.heads_first(y, lengths[0]) for y in total[:2])
        of_keys = tuple(
            tile.from_blocks(jnp.swapaxes(y, 3, 4), 2, lengths[1]) for y in total[3:]
        )
        return (dq, dat, _of_heads(total.dridge, lengths[0])), of_keys

    of_rows = OfQueries(points.at, fit.mean, fit.lse, fit.total, points.ridge)
    queries = of_rows, (fit.x, cotangents.o), cotangents.lse
    args = points.inputs, queries, of_pairs, lists, lists.backward
    (dq, dat, dridge), (dk, dv) = over_heads(run, *args)
    return Points(Inputs(dq, dk, dv), dat, dridge)


def _add_row(
    total: FitGradients, at: Array, blocks: Blocks, arrays: GroupArrays,
    held: tuple[Array, Array, Array], accuracy: Accuracy,
) -> FitGradients:  # fmt: skip
    """``total`` with the gradients of one row; ``held`` are x, do and dlse."""
    row, scale = arrays.row(at, blocks), arrays.call.sm_scale
    x, do = (jnp.where(row.some, arrays.vectors_of(y, at), 0.0) for y in held[:2])
    dlse = jnp.where(row.some, tile.row_of(held[2], at)[..., None], 0.0)

    def moments(sums: tuple[Array, Array], keys: KeyTile) -> tuple[Array, Array]:
        b, kg = sums
        pg = keys.p * dot(do, arrays.values(keys), (1, 1))
        return b + pg.sum(axis=-1, keepdims=True), kg + dot(pg, keys.k, (1, 0))

    b, kg = row.fold(moments, vary((jnp.zeros_like(dlse), jnp.zeros_like(x)), x))
    h = kg - row.mean * b
    y, _ = row.solved(h, accuracy)
    rest = row.at - row.mean - row.ridge * x
    delta = b + jnp.sum(h * x - y * rest, axis=-1, keepdims=True) - dlse
    rows = jnp.concatenate([scale * row.q, x, -y], axis=2)

    def add(state: tuple[Array, Array, Array], keys: KeyTile) -> Any:
        dq, dk, dv = state
        g = dot(do, arrays.values(keys), (1, 1))
        along_x, along_y = row.along(keys, x), row.along(keys, y)
        ds = keys.p * ((g - along_y) * (1 + along_x) - b * along_x - delta)
        weights = keys.p * (1 + along_x)
        of_rows = jnp.concatenate([ds, keys.p * (g - b - along_y), weights], axis=2)
        own = add_keys((dk, dv), (of_rows, weights), (rows, do), keys.block)
        return (dq + dot(ds, keys.k, (1, 0)), *own)

    # The ds of a query add up to dlse, so the centre of the keys has that share in dq.
    start = dlse * row.centre, total.dk, total.dv
    dq, dk, dv = row.fold(add, start)
    dridge = -jnp.sum(x * y, axis=-1)
    return FitGradients(
        tile.put_queries(total.dq, scale * dq, at),
        tile.put_queries(total.dat, y, at),
        tile.put_row(total.dridge, dridge, at),
        dk, dv,
    )  # fmt: skip


def _of_heads(x: Array, length: int) -> Float[Array, "batch heads {length}"]:
    """Undoes ``numbers`` for the heads of a group."""
    found = tile.from_blocks(x, 3, length)
    return found.reshape(found.shape[0], -1, length)
