"""Attention by lists in plain JAX, strip by strip; derivatives of every order.

A strip of rows gathers its keys and values once. Values that are channels of the keys
(``ListCall.values``) are not cut out of them, which would copy each strip: products
have all channels, and those of no value are 0 or dropped. The gradients of keys and
values are then one product and one scatter.

The queries of a row and the heads of its group are the rows of one product. The
backward pass computes the weights again from the lse and adds the gradients of keys
with a scatter, which XLA:CPU runs in a fixed order. Memory is linear in the lengths and
in the size of the lists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dense, softmax
from pallas_kernels.call import Cotangents, Inputs, Kept, Outputs, Vectors
from pallas_kernels.lists.call import ListCall, held, num_blocks
from pallas_kernels.lists.strips import (
    Listed,
    ListSizes,
    UnitArrays,
    by_blocks,
    by_rows,
    from_rows,
    listed,
    over_units,
    sizes_of,
    taken,
    wide_inputs,
)
from pallas_kernels.precision import widened
from pallas_kernels.shared_values import in_keys, of_keys
from pallas_kernels.varying import vary
from pallas_kernels.xla.passes import Passes, passes
from pallas_kernels.xla.primitive import attend


def forward(inputs: Inputs, vectors: Vectors, index: Array, call: ListCall) -> Kept:
    """Attention of each row to the keys of its list."""
    sizes = sizes_of(inputs, index, call)
    q, k, v = wide_inputs(inputs)

    def of_unit(given: UnitArrays, queries: tuple, keys: tuple) -> Kept:
        (q,), (k, *v) = queries, keys

        def of_strip(strip: Array) -> tuple[Array, Array, Array]:
            found = listed(strip, given, sizes, call)
            key = taken(k, found)
            s = _scores(q[strip], key, found, call)
            top = jnp.maximum(s.max(axis=-1, keepdims=True), softmax.least(s.dtype))
            p = softmax.power(s - top, call.unit)
            o = _cut(_dot(p, taken(v[0], found) if v else key, (2, 1)), call)
            carry = softmax.Carry(o, top, p.sum(axis=-1, keepdims=True))
            o, lse, total = softmax.finish(carry, call.unit)
            shape = sizes.rows, call.block_q, sizes.heads
            return (
                o.reshape(*shape, -1), lse.reshape(shape), total.reshape(shape)
            )  # fmt: skip

        return Kept(*jax.lax.map(of_strip, jnp.arange(sizes.strips, dtype=jnp.int32)))

    args = vectors, index, sizes, call
    queries, keys = (by_rows(q, sizes, call),), _loaded((k, v), call)
    o, lse, total = over_units(of_unit, queries, keys, *args)
    return Kept(
        from_rows(o, sizes).astype(inputs.q.dtype),
        from_rows(lse, sizes),
        from_rows(total, sizes),
    )


def backward(
    inputs: Inputs, cotangents: Cotangents, vectors: Vectors, index: Array,
    call: ListCall,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """``dq, dk, dv`` in the shapes and dtypes of the inputs."""
    sizes = sizes_of(inputs, index, call)
    q, k, v = wide_inputs(inputs)
    lse, do, delta = cotangents
    do = widened(do)
    if call.values is not None:
        do = in_keys(do, call.values, k.shape[-1])

    def of_unit(given: UnitArrays, queries: tuple, keys: tuple) -> tuple:
        q, lse, do, delta = queries
        k, *v = keys
        start = vary(jax.tree.map(jnp.zeros_like, keys), q, *keys, do)

        def of_strip(totals: tuple, strip: Array) -> tuple[tuple, Array]:
            found = listed(strip, given, sizes, call)
            key, own, d = taken(k, found), _merged(q[strip]), _merged(do[strip])
            raw = _capped(own, key, call)
            value = taken(v[0], found) if v else key
            p, ds = softmax.score_gradient(
                _masked(raw, found),
                softmax.lse_for_backward(_merged(lse[strip][..., None]), call.unit),
                _dot(d, value, (2, 2)),
                _merged(delta[strip][..., None]),
                slope=softmax.cap_slope(raw, call.logits_soft_cap, call.unit),
                unit=call.unit,
            )
            ds = ds * call.sm_scale
            if v:
                new = [_dot(ds, own, (1, 1)), _dot(p, d, (1, 1))]
            else:
                weights, rows = (jnp.concatenate(x, 1) for x in ((ds, p), (own, d)))
                new = [_dot(weights, rows, (1, 1))]
            pairs = zip(totals, new, strict=True)
            totals = tuple(_added(total, x, found) for total, x in pairs)
            return totals, _dot(ds, key, (2, 1)).reshape(q.shape[1:])

        strips = jnp.arange(sizes.strips, dtype=jnp.int32)
        totals, dq = jax.lax.scan(of_strip, start, strips)
        return dq, totals

    queries = (
        by_rows(q, sizes, call),
        by_rows(lse, sizes, call, -jnp.inf),
        by_rows(do, sizes, call),
        by_rows(delta, sizes, call),
    )
    args = vectors, index, sizes, call
    dq, totals = over_units(of_unit, queries, _loaded((k, v), call), *args)
    dk, dv = [*(_of_heads(x, sizes) for x in totals), jnp.zeros_like(inputs.v)][:2]
    found = from_rows(dq, sizes), dk, dv
    dq, dk, dv = (x.astype(y.dtype) for x, y in zip(found, inputs, strict=True))
    return dq, dk, dv


def tangent(
    inputs: Inputs, direction: tuple[Inputs, Any], kept: Kept, vectors: Vectors,
    index: Array, call: ListCall,
) -> Outputs:  # fmt: skip
    """The derivative of the outputs along ``direction``; see ``xla/tangent.py``."""
    sizes = sizes_of(inputs, index, call)
    q, k, v = wide_inputs(inputs)
    moves = wide_inputs(direction[0])

    def of_unit(given: UnitArrays, queries: tuple, keys: tuple) -> tuple[Array, Array]:
        q, dq, lse = queries
        k, dk, *values = keys

        def of_strip(strip: Array) -> tuple[Array, Array]:
            found = listed(strip, given, sizes, call)
            key, own = taken(k, found), _merged(q[strip])
            raw = _capped(own, key, call)
            back = softmax.lse_for_backward(_merged(lse[strip][..., None]), call.unit)
            p = softmax.power(_masked(raw, found) - back, call.unit)
            turned = _dot(_merged(dq[strip]), key, (2, 2))
            moved = taken(dk, found)
            turned += _dot(own, moved, (2, 2))
            slope = softmax.cap_slope(raw, call.logits_soft_cap, call.unit)
            pds = p * turned * call.sm_scale * slope
            v, dv = (taken(x, found) for x in values) if values else (key, moved)
            o = _cut(_dot(pds, v, (2, 1)) + _dot(p, dv, (2, 1)), call)
            shape = sizes.rows, call.block_q, sizes.heads
            return o.reshape(*shape, -1), pds.sum(axis=-1).reshape(shape)

        return jax.lax.map(of_strip, jnp.arange(sizes.strips, dtype=jnp.int32))

    queries = (
        by_rows(q, sizes, call),
        by_rows(moves.q, sizes, call),
        by_rows(kept.lse, sizes, call, -jnp.inf),
    )
    keys = _loaded((k, moves.k, v, moves.v), call)
    found = over_units(of_unit, queries, keys, vectors, index, sizes, call)
    o, lse = (from_rows(x, sizes) for x in found)
    moved_lse = lse / kept.total
    o = o / kept.total[..., None] - moved_lse[..., None] * widened(kept.o)
    return Outputs(o.astype(kept.o.dtype), moved_lse)


def over_pairs(
    inputs: Inputs, vectors: Vectors, tests: Any, index: Array, call: ListCall
) -> Outputs:
    """The outputs in plain JAX over all pairs, differentiable to any order."""
    del tests
    return dense.of_pairs(inputs, allowed(inputs, vectors, index, call), call)


def allowed(inputs: Inputs, vectors: Vectors, index: Array, call: ListCall) -> Array:
    """The pairs that attend, bool ``[batch or 1, q_heads, q, kv]``."""
    (_, q_heads, q_seq_len, _), kv_seq_len = inputs.q.shape, inputs.k.shape[2]
    blocks = held(index, num_blocks(kv_seq_len, call.block_kv))
    q_ids = jnp.arange(q_seq_len, dtype=jnp.int32)
    k_ids = jnp.arange(kv_seq_len, dtype=jnp.int32)
    pairs = blocks[:, :, q_ids // call.block_q][..., k_ids // call.block_kv]
    q_vectors = tuple(x[..., :, None] for x in vectors.q)
    kv_vectors = tuple(x[..., None, :] for x in vectors.kv)
    ids = q_ids[None, None, :, None], k_ids[None, None, None, :]
    pairs = pairs & call.predicate(0, *ids, q_vectors, kv_vectors, ())
    return jnp.repeat(pairs, q_heads // pairs.shape[1], axis=1)


@passes.register
def _(call: ListCall) -> Passes:
    """The passes by lists."""
    del call
    return Passes(forward, backward, tangent, over_pairs)


def attend_lists(
    inputs: Inputs, vectors: Vectors, index: Array, call: ListCall
) -> Outputs:
    """Outputs and lse, differentiable in both modes."""
    return attend(call, inputs, vectors, None, index).outputs


def _loaded(arrays: tuple[Array, ...], call: ListCall) -> tuple[Array, ...]:
    """The blocks of keys, and of values unless they are channels of the keys."""
    count = len(arrays) if call.values is None else len(arrays) // 2
    return tuple(by_blocks(x, call) for x in arrays[:count])


def _cut(o: Array, call: ListCall) -> Array:
    """The channels of ``o`` that values have."""
    return o if call.values is None else of_keys(o, call.values)


def _merged(x: Array) -> Array:
    """``[rows, block_q, heads, dim]`` as ``[rows, block_q * heads, dim]``."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _scores(q: Array, key: Array, found: Listed, call: ListCall) -> Array:
    return _masked(_capped(_merged(q), key, call), found)


def _capped(q: Array, key: Array, call: ListCall) -> Array:
    s = _dot(q * call.scale, key, (2, 2))
    return softmax.cap(s, call.logits_soft_cap, call.unit)


def _masked(s: Array, found: Listed) -> Array:
    """Scores ``[rows, block_q * heads, keys]``, with -inf where no pair attends."""
    rows, block_q, _, keys = found.shown.shape
    apart = s.reshape(rows, block_q, -1, keys)
    return softmax.mask(apart, found.shown).reshape(s.shape)


def _added(total: Array, x: Array, found: Listed) -> Array:
    """Adds ``[rows, keys, dim]`` to their blocks in ``[blocks, block_kv, dim]``."""
    _, block_kv, dim = total.shape
    flat = x.reshape(-1, block_kv, dim)
    return total.at[found.at.reshape(-1)].add(flat, mode="promise_in_bounds")


def _of_heads(x: Array, sizes: ListSizes) -> Array:
    """``[units, blocks, block_kv, dim]`` as ``[batch, kv_heads, kv, dim]``, summed."""
    x = x.reshape(sizes.batch, sizes.kv_heads, -1, *x.shape[1:]).sum(axis=2)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return x[:, :, : sizes.kv_seq_len]


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product of each row of a strip, accumulated in the dtype of sums."""
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((0,), (0,))), precision="highest"
    )
