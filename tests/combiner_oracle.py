"""Combiner as the paper writes it: sets by loops, sums over all of them, in float64.

For each query, a pattern of ``n`` tokens lists the keys that it attends to directly and
the regions that it reads. A region has members, and the token whose query summarises
them (None: the pool of its members' queries).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Region(NamedTuple):
    members: tuple[int, ...]
    asks: int | None = None


class Pattern(NamedTuple):
    direct: list[list[int]]
    regions: list[list[Region]]


def _of(n, direct, regions) -> Pattern:
    """Builds a pattern from two functions of a query; drops regions without members."""
    return Pattern(
        [[j for j in range(n) if direct(i, j)] for i in range(n)],
        [
            [r if isinstance(r, Region) else Region(tuple(r)) for r in regions(i) if r]
            for i in range(n)
        ],
    )


def fixed(n, s, causal=True, own=False) -> Pattern:
    def regions(i):
        spans = [[j for j in range(n) if j // s == r] for r in range(-(-n // s))]
        if causal:
            return spans[: i // s]
        return [span for r, span in enumerate(spans) if own or r != i // s]

    return _of(n, lambda i, j: i // s == j // s and (j <= i or not causal), regions)


def logsparse(n) -> Pattern:
    def regions(i):
        for bit in range(i.bit_length()):
            if i >> bit & 1:
                yield range(((i >> bit) - 1) << bit, (i >> bit) << bit)

    return _of(n, lambda i, j: i == j, regions)


def _cross(w, causal):
    def direct(i, j):
        row = i // w == j // w and (j <= i or not causal)
        return row or (i % w == j % w and (j // w < i // w or not causal))

    return direct


def vertical(n, w, causal=True) -> Pattern:
    def regions(i):
        for c in range(w):
            if c != i % w:
                column = [j for j in range(n) if j % w == c]
                yield [
                    j
                    for j in column
                    if (j // w < i // w if causal else j // w != i // w)
                ]

    return _of(n, _cross(w, causal), regions)


def _rows(n, w, i, causal):
    for r in range(-(-n // w)):
        if r < i // w or (not causal and r != i // w):
            yield [j for j in range(n) if j // w == r]


def horizontal(n, w, causal=True) -> Pattern:
    def regions(i):
        for row in _rows(n, w, i, causal):
            yield [j for j in row if j % w != i % w]

    return _of(n, _cross(w, causal), regions)


def rowmajor(n, w, causal=True) -> Pattern:
    def regions(i):
        for row in _rows(n, w, i, causal):
            yield Region(tuple(row), row[i % w])

    def direct(i, j):
        return i // w == j // w and (j <= i or not causal)

    return _of(n, direct, regions)


def mixture(n, w) -> Pattern:
    """The pattern of the published code, which is under one softmax."""
    columns = vertical(n, w)

    def regions(i):
        yield from (r.members for r in columns.regions[i])
        for row in _rows(n, w, i, causal=True):
            yield [j for j in row if j % w < i % w]
            yield [j for j in row if j % w > i % w]

    return _of(n, _cross(w, True), regions)


def routing(labels, causal=True) -> Pattern:
    n = len(labels)

    def regions(i):
        for c in sorted({*labels} - {labels[i]}):
            yield [j for j in range(n) if labels[j] == c and (j <= i or not causal)]

    return _of(
        n, lambda i, j: labels[i] == labels[j] and (j <= i or not causal), regions
    )


def without(pattern: Pattern, gone: set[int]) -> Pattern:
    """The pattern without the keys ``gone`` and without regions of these alone."""
    kept = [[j for j in row if j not in gone] for row in pattern.direct]
    regions = [
        [r._replace(members=tuple(j for j in r.members if j not in gone)) for r in row]
        for row in pattern.regions
    ]
    return Pattern(kept, [[r for r in row if r.members] for row in regions])


class Arrays(NamedTuple):
    """A pattern as arrays.

    ``direct`` and ``seen`` count how often a query has each key and each region.
    ``members`` are those of each region, ``asks`` is its token.
    """

    direct: np.ndarray
    seen: np.ndarray
    members: np.ndarray
    asks: np.ndarray


def arrays_of(pattern: Pattern) -> Arrays:
    n = len(pattern.direct)
    found = dict.fromkeys(r for row in pattern.regions for r in row)
    # At least one region, which no query reads.
    index = {r: i for i, r in enumerate(found or {Region((0,)): None})}
    made = Arrays(
        np.zeros((n, n)), np.zeros((n, len(index))), np.zeros((len(index), n), bool),
        np.array([-1 if r.asks is None else r.asks for r in index]),
    )  # fmt: skip
    for i in range(n):
        for j in pattern.direct[i]:
            made.direct[i, j] += 1
        for region in pattern.regions[i]:
            made.seen[i, index[region]] += 1
    for region, row in index.items():
        made.members[row, list(region.members)] = True
    return made


class Options(NamedTuple):
    """``key``: how the key of a region with a token is made."""

    pool: str = "max"
    phi: Callable = lambda x: x
    key: str = "none"
    proj: Callable = lambda x: x


DEFAULTS = Options()


def _pool(x, members, pool):
    inside = members[:, :, None]
    if pool == "max":
        return jnp.where(inside, x[None], -jnp.inf).max(axis=1)
    total = jnp.where(inside, x[None], 0.0).sum(axis=1)
    return (
        total if pool == "sum" else total / members.sum(axis=1).astype(x.dtype)[:, None]
    )


def head(q, k, v, pattern: Arrays, scale, options=DEFAULTS):
    """Out and lse of one head: q, k, v ``[n, dim]``."""
    direct, seen, members, asks = map(jnp.asarray, pattern)
    asked = _pool(options.phi(q), members, options.pool)
    keys = _pool(options.phi(k), members, options.pool)
    asked = jnp.where((asks >= 0)[:, None], q[asks], asked)
    scores = jnp.where(members, asked @ k.T * scale, -jnp.inf)
    inner = jax.nn.softmax(scores, axis=1)
    values = inner @ v
    of_token = {
        "none": lambda: k[asks],
        "wsum": lambda: inner @ k,
        "proj": lambda: options.proj(values),
        "wsum_proj": lambda: options.proj(inner @ k),
    }
    keys = jnp.where((asks >= 0)[:, None], of_token[options.key](), keys)
    weights = jnp.concatenate(
        [direct * jnp.exp(q @ k.T * scale), seen * jnp.exp(q @ keys.T * scale)], axis=1
    )
    total = weights.sum(axis=1)
    out = weights @ jnp.concatenate([v, values]) / total[:, None]
    return out, jnp.log(total)


def _every_head(q, k, v, patterns, scale, options):
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    of_head = partial(head, scale=scale, options=options)
    each = jax.vmap(of_head, in_axes=(1, 1, 1, 0), out_axes=(1, 0))
    of_batch = jax.vmap(each, in_axes=(0, 0, 0, None))
    return of_batch(q, k, v, patterns)


def stacked(patterns: list[Pattern]) -> Arrays:
    """The arrays of one pattern for each head, padded to equal sizes."""
    made = [arrays_of(p) for p in patterns]
    most = 4 * len(patterns[0].direct)
    # Unread regions as padding, so that heads stack and all patterns compile once.
    filled = [
        Arrays(
            m.direct,
            np.pad(m.seen, ((0, 0), (0, most - len(m.asks)))),
            np.pad(m.members, ((0, most - len(m.asks)), (0, 0)), constant_values=True),
            np.pad(m.asks, (0, most - len(m.asks)), constant_values=-1),
        )
        for m in made
    ]
    return Arrays(*(np.stack(x) for x in zip(*filled, strict=True)))


@partial(jax.jit, static_argnames="options")
def _with_gradients(q, k, v, do, patterns, options):
    scale = q.shape[-1] ** -0.5
    run = partial(_every_head, patterns=patterns, scale=scale, options=options)
    (out, lse), pull = jax.vjp(run, q, k, v)
    return out, lse, *pull((do, jnp.sin(1 + lse)))


def attention(q, k, v, do, patterns: list[Pattern], options=DEFAULTS):
    """Out ``[batch, n, heads, dim]``, lse ``[batch, heads, n]``, dq, dk and dv.

    Each head has its own pattern. The cotangent of the lse is ``sin(1 + lse)``.
    """
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, do)]
        found = _with_gradients(*wide, stacked(patterns), options)
        return [np.asarray(x) for x in found]
