"""Sends all keys around the devices, and merges what each step finds.

After as many steps as there are shards, each query has seen all keys, of which a device
never holds more than two shards (Liu et al., Ring attention with blockwise transformers
for near-infinite context, 2023). The gradient goes around once more: each step runs
again, and the gradients of keys travel with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.precision import wide, widened
from pallas_kernels.varying import vary
from sadsl.run import merging
from sadsl.run.types import QKV, Outcome
from sadsl.sharding.shard import Shard
from sadsl.sharding.wire import Rows, ShardKeys

Over: TypeAlias = Callable[[Shard, ShardKeys], Outcome]
# Arrays with a gradient: queries, rows of keys, and run-time arrays.
Floats: TypeAlias = tuple[Array, Rows, Mapping[str, Array]]
# Arrays without one: run-time arrays, and the positions of queries.
Others: TypeAlias = tuple[Mapping[str, Array], Array]
# What travels: rows with a gradient and without one, and the positions of keys.
Travels: TypeAlias = tuple[Rows, Rows, Array]
SCALE = "ring.scale"


def around(shard: Shard, rows: Rows, over: Over) -> Outcome:
    """The outcome over the keys of all shards; ``over`` attends to those of one."""
    index = shard.first_key + jnp.arange(shard.shards.kv_size, dtype=jnp.int32)
    position = jnp.where(index < shard.shards.kv_seq_len, index, -1)
    q, read = shard.inputs[0], dict(shard.given)
    if not isinstance(shard.setting.sm_scale, float):
        read[SCALE] = shard.setting.sm_scale
    float_rows, other_rows = _by_kind(rows)
    float_given, other_given = _by_kind(read)
    like = q, rows, position
    floats = vary((q, float_rows, float_given), like)
    other_rows, position = vary((other_rows, position), like)
    others = other_given, vary(shard.query_positions, like)
    moved, nothing = shard.queries is not None, cast(QKV, ())
    scale = None if SCALE in read else shard.setting.sm_scale
    setting = replace(shard.setting, sm_scale=scale)
    # Without arrays, so that it is static.
    plain = replace(shard, inputs=nothing, given={}, queries=None, setting=setting)
    step = partial(_step, shard=plain, over=over, moved=moved)
    options = step, shard.axis, shard.shards.count
    return Outcome(*_around(floats, others, (other_rows, position), *options))


def _by_kind(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of floats, and the others."""
    floats = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return floats, {n: x for n, x in arrays.items() if n not in floats}


def _step(
    floats: Floats, others: Others, travels: Travels, *, shard: Shard, over: Over,
    moved: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """Output and lse over the keys that a device has now, in the width of sums."""
    (q, _, float_given), (given, queries) = floats, others
    rows, other_rows, position = travels
    known = {**float_given, **given}
    if SCALE in known:
        setting = replace(shard.setting, sm_scale=known.pop(SCALE))
        shard = replace(shard, setting=setting)
    positions = queries if moved else None
    own = replace(shard, inputs=(q, q, q), given=known, queries=positions)
    found = over(own, ShardKeys({**rows, **other_rows}, position))
    assert found.lse is not None
    return widened(found.out), found.lse.astype(wide(q.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _around(
    floats: Floats, others: Others, own: tuple[Rows, Array], step: Any, axis: str,
    count: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Output and lse of the queries of a shard over all keys."""
    q, rows, _ = floats
    first: Travels = rows, *own

    def turn(carry: Any, _: None) -> Any:
        travels, so_far = carry
        travels = _passed_on(travels, axis, count)
        found = Outcome(*step(floats, others, travels))
        merged = merging.merge([Outcome(*so_far), found])
        return (travels, (merged.out, merged.lse)), None

    start = first, step(floats, others, first)
    (_, (out, lse)), _ = jax.lax.scan(turn, start, None, length=count - 1)
    return out.astype(q.dtype), lse


def _passed_on(tree: Any, axis: str, count: int) -> Any:
    """The arrays of the device before."""
    pairs = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


def _forward(
    floats: Floats, others: Others, own: tuple[Rows, Array], *options: Any
) -> tuple[tuple[Array, Array], Any]:
    found = _around(floats, others, own, *options)
    return found, (floats, others, own, found)


def _backward(
    step: Any, axis: str, count: int, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[Floats, None, None]:
    """The gradients of all floats.

    With shares ``w = exp(L_t - L)`` of the steps, ``o = sum w o_t`` has the cotangents
    ``w do`` of ``o_t`` and ``w (do . (o_t - o) + dL)`` of ``L_t``.
    """
    floats, others, own, (out, lse) = saved
    (q, rows, given), (d_out, d_lse) = floats, cotangents
    out, d_out = widened(out), widened(d_out)
    add = partial(jax.tree.map, lambda a, b: a + b.astype(a.dtype))

    def turn(carry: Any, _: None) -> Any:
        (rows, *rest), d_rows, so_far = carry
        run = lambda q, rows, given: step((q, rows, given), others, (rows, *rest))
        (o, part), pull = jax.vjp(run, q, rows, given)
        empty = jnp.isneginf(part)
        share = jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, part) - _safe(lse)))
        by_row = jnp.swapaxes(share, 1, 2)[..., None]
        along = jnp.swapaxes((d_out * (o - out)).sum(axis=-1), 1, 2)
        more_q, more_rows, more_given = pull((by_row * d_out, share * (along + d_lse)))
        so_far, d_rows = add(so_far, (more_q, more_given)), add(d_rows, more_rows)
        # The gradients of keys are home after as many steps as there are devices.
        return (*_passed_on(((rows, *rest), d_rows), axis, count), so_far), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(widened(x)), (rows, (q, given)))
    start = (rows, *own), *vary(zeros, q)
    (_, d_rows, (d_q, d_given)), _ = jax.lax.scan(turn, start, None, length=count)
    found = d_q, d_rows, d_given
    same = jax.tree.map(lambda x, like: x.astype(like.dtype), found, floats)
    return same, None, None


def _safe(lse: Array) -> Array:
    """The lse, 0 for queries without keys."""
    return jnp.where(jnp.isneginf(lse), 0.0, lse)


_around.defvjp(_forward, _backward)
