"""Groups the query heads that one loop processes: those with the same map."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class HeadGroup(NamedTuple):
    """Query heads of one map, sorted by key head, with equally many per key head."""

    map_index: int
    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    # The number of the predicate's test; traced if a loop runs over maps.
    test: Any


def head_groups(
    map_of_head: tuple[int, ...], test_of_map: tuple[int, ...], num_kv_heads: int
) -> list[HeadGroup]:
    """Splits all query heads into groups; a call with one map has one group."""
    group = len(map_of_head) // num_kv_heads
    of_kv_head: dict[tuple[int, int], list[int]] = {}
    for head, index in enumerate(map_of_head):
        of_kv_head.setdefault((index, head // group), []).append(head)
    merged: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    for (index, kv_head), heads in of_kv_head.items():
        merged.setdefault((index, len(heads)), []).append((kv_head, heads))
    return [
        HeadGroup(
            index,
            tuple(head for _, heads in members for head in heads),
            tuple(kv_head for kv_head, _ in members),
            test_of_map[index],
        )
        for (index, _), members in merged.items()
    ]


def pick(x: jax.Array, heads: tuple[int, ...]) -> jax.Array:
    """``x[:, heads]``; ``x`` itself if these are all heads in order."""
    if heads == tuple(range(x.shape[1])):
        return x
    return x[:, np.array(heads)]


def join(parts: list[jax.Array], heads: list[tuple[int, ...]]) -> jax.Array:
    """Joins the parts of disjoint groups that contain all heads; undoes ``pick``."""
    if len(parts) == 1 and heads[0] == tuple(range(len(heads[0]))):
        return parts[0]
    order = np.argsort(np.concatenate([np.array(h) for h in heads]))
    return jnp.concatenate(parts, axis=1)[:, order]


def add_up(
    parts: list[jax.Array], heads: list[tuple[int, ...]], num_heads: int
) -> jax.Array:
    """Sums the parts of groups into ``[batch, num_heads, ...]``; groups may overlap."""
    if len(parts) == 1 and heads[0] == tuple(range(num_heads)):
        return parts[0]
    total = jnp.zeros(
        (parts[0].shape[0], num_heads, *parts[0].shape[2:]), parts[0].dtype
    )
    for part, of in zip(parts, heads, strict=True):
        total = total.at[:, np.array(of)].add(part)
    return total
