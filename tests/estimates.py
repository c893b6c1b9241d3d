"""Estimated and hierarchical patterns by their definitions, in slow float64 NumPy."""

from functools import partial

import jax
import numpy as np

from sadsl.run.call import select

DIM = 8
SCALE = DIM**-0.5


def sample(n, heads=2, kv_heads=1, batch=1, seed=0):
    """q, k, v in float32, ``[batch, n, heads, head_dim]``."""
    rng = np.random.default_rng(seed)
    shapes = (batch, n, heads, DIM), *2 * [(batch, n, kv_heads, DIM)]
    return [rng.normal(size=s).astype(np.float32) * 2 for s in shapes]


@partial(jax.jit, static_argnums=(0, 4))
def parts_of(spec, q, k, operands, q_offset=0):
    return select(spec, q, k, operands=operands, q_offset=q_offset)


def pairs_of(spec, q, k, operands=None, entry=0):
    """The pairs that the implementation selects, ``[heads, n, n]``."""
    parts = parts_of(spec, q, k, operands or {})
    one = {name: np.asarray(x)[entry % len(x)] for name, x in parts.items()}
    n, heads = q.shape[1], q.shape[2]
    return spec.dense(n, num_heads=heads, operands=one)


def by_head(q, k):
    """float64 queries and keys of every head: ``[n, d]`` pairs."""
    group = q.shape[2] // k.shape[2]
    return [
        (q[0, :, h].astype(float), k[0, :, h // group].astype(float))
        for h in range(q.shape[2])
    ]


def order_of(scores, forced=()):
    """Indices in order: forced, then by score; ties to the lower; no NaN, no inf."""
    found = [i for i in range(len(scores)) if i in forced or np.isfinite(scores[i])]
    return sorted(
        found, key=lambda i: (i not in forced, i if i in forced else -scores[i], i)
    )


def given_by(q, k, rows, competes):
    """The mean mass of each column and offset over some rows; NaN where unseen."""
    n = len(k)
    columns, slashes = np.full(n, np.nan), np.full(len(q), np.nan)
    for i in rows:
        logits = {j: q[i] @ k[j] * SCALE for j in range(min(i + 1, n))}
        logits = {j: s for j, s in logits.items() if np.isfinite(s)}
        total = sum(np.exp(s - max(logits.values())) for s in logits.values())
        for j, s in logits.items():
            if competes[j]:
                mass = np.exp(s - max(logits.values())) / total / len(rows)
                columns[j] = np.nan_to_num(columns[j]) + mass
                slashes[i - j] = np.nan_to_num(slashes[i - j]) + mass
    return columns, slashes


def union(n, columns, slashes):
    i, j = np.indices((n, n))
    return (j <= i) & (np.isin(j, list(columns)) | np.isin(i - j, list(slashes)))


def budget_by_definition(q, k, flags, spec):
    """The keys that each query sees in DHSA, computed query by query."""
    n = q.shape[1]
    qm, km = (x[0].astype(float).mean(axis=1) for x in (q, k))
    starts = sorted({0, *np.flatnonzero(flags)})[: spec.max_chunks]
    chunks = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], n], strict=True)]
    found = np.zeros((n, n), bool)
    for i in range(n):
        rows = range(
            i // spec.block * spec.block, min((i // spec.block + 1) * spec.block, n)
        )
        query = np.sqrt(len(rows)) * qm[rows].mean(axis=0)
        scores = [query @ (np.sqrt(len(c)) * km[c].mean(axis=0)) for c in chunks]
        end = rows[-1] + 1 if spec.by_block else i + 1
        seen = [j for j in range(end) if j < spec.first or j >= end - spec.local]
        for c in order_of(scores):
            for j in chunks[c]:
                if j < end and j not in seen and len(seen) < spec.budget:
                    seen.append(j)
        if i >= n - spec.last:
            seen = range(n)
        found[i, [j for j in seen if j <= i]] = True
    return found


def boundaries_by_definition(q, k, *, window, suppress, threshold=1.1):
    """Where the teacher starts chunks, but for the first chunk; best boundary first."""
    n, w = q.shape[1], window
    a = np.zeros((n, n))
    for qh, kh in by_head(q, k):
        for i in range(n):
            p = np.exp(qh[i] @ kh[: i + 1].T * SCALE)
            a[i, : i + 1] += p / p.sum() / q.shape[2]
    ratio = np.zeros(n)
    for c in range(2 * w - 1, n - 2 * w):
        past = a[c + w :, c - w + 1 : c + 1].sum()
        after = a[c + w :, c + 1 : c + w + 1].sum()
        ratio[c] = (max(past, after) + 1e-6) / (min(past, after) + 1e-6)
    taken = []
    for c in sorted(range(n), key=lambda c: -ratio[c]):
        if ratio[c] > threshold and all(abs(c - x) > suppress for x in taken):
            taken.append(c)
    return [c + 1 for c in taken]


def replay(score, num_blocks, slots):
    """The keys of the tree search; ``score(block)`` scores a node's first block."""
    nodes = []
    for i in range(slots):
        a = num_blocks * i // slots
        nodes.append((a, num_blocks * (i + 1) // slots - a))
    ratio = num_blocks / slots
    while ratio > 1:
        halves = []
        for a, z in nodes:
            middle = int(a + z / 2)
            halves += [(a, middle - a), (middle, z - (middle - a))]
        halves = [node for node in halves if node[1] >= 1]
        nodes = sorted(sorted(halves, key=lambda node: -score(node[0]))[:slots])
        ratio /= 2
    return [a for a, _ in nodes]


def descent_by_definition(q, k, spec):
    n = len(k)
    found = np.zeros((n, n), bool)
    for start in range(0, n, spec.block_q):
        end = min(start + spec.block_q, n)
        stop = max(0, end - spec.sliding_window)
        rows = range(start + 1, end, 2) if end - start > 1 else [start]

        def score(block, rows=rows):
            keys = range(block * spec.block_kv, min((block + 1) * spec.block_kv, n))
            return max(q[i] @ k[j] for i in rows for j in keys)

        num_blocks, slots = -(-stop // spec.block_kv), -(-spec.mask_k // spec.block_kv)
        chosen = range(num_blocks)
        if stop > spec.mask_k:
            chosen = replay(score, num_blocks, slots)
        for i in range(start, end):
            for j in range(i + 1):
                seen = j // spec.block_kv in chosen or j >= stop or j < spec.sinks
                found[i, j] = seen or (spec.by_row and i - j < spec.sliding_window)
    return found
