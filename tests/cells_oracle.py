"""Selections of cells by their definition, cell by cell in float64."""

import numpy as np

N, HEADS, KV_HEADS = 70, 4, 2


def parts(partition, length):
    """The positions of each part of a partition of ``length`` positions."""
    if isinstance(partition, int):
        labels = [i // partition for i in range(length)]
    else:
        cells = [np.unravel_index(i, partition.sizes) for i in range(length)]
        tiled = [tuple(np.array(c) // partition.tile) for c in cells]
        counts = [
            -(-n // t) for n, t in zip(partition.sizes, partition.tile, strict=True)
        ]
        labels = [int(np.ravel_multi_index(t, counts)) for t in tiled]
    return [
        [i for i, found in enumerate(labels) if found == each]
        for each in range(max(labels) + 1)
    ]


def cell_score(by, q, k, rows, columns, pairs):
    """The score of one cell of one head; ``q`` is already scaled."""
    match by:
        case "mean":
            return q[rows].mean(axis=0) @ k[columns].mean(axis=0)
        case "min_max":
            mean, some = q[rows].mean(axis=0), k[columns]
            ends = mean * some.min(axis=0), mean * some.max(axis=0)
            return np.maximum(*ends).sum()
        case "max":
            return (q[rows] @ k[columns].T).max()
        case "attention":
            weights = np.where(pairs, np.exp(q @ k.T), 0)
            total = weights.sum(axis=1, keepdims=True)
            p = weights / np.where(total == 0, 1, total)
            return p[np.ix_(rows, columns)].sum() / len(rows)


def cells_of(a, rows, columns, value):
    """Which cells hold a pair of the map, ``[heads, rows, columns]``.

    All are ``value`` if the map is None.
    """
    if a is None:
        return np.full((HEADS, len(rows), len(columns)), value)
    dense = a.dense(N, num_heads=HEADS)
    found = [[dense[:, r][:, :, c].any(axis=(1, 2)) for c in columns] for r in rows]
    return np.moveaxis(np.array(found), 2, 0)


def expected(spec, q, k, gate=None):
    """The cells that the definition chooses, ``[batch, heads, rows, columns]``."""
    rows, columns = parts(spec.rows, N), parts(spec.block, N)
    forced = cells_of(spec.forced, rows, columns, False)
    eligible = cells_of(spec.eligible, rows, columns, True)
    forced &= eligible
    size = {"group": HEADS // KV_HEADS, "shared": HEADS}.get(spec.scope, 1)
    if size > 1:
        forced, eligible = (
            x.reshape(-1, size, *x.shape[1:]).any(axis=1).repeat(size, axis=0)
            for x in (forced, eligible)
        )
    broken = cells_of(
        None if spec.eligible is None else ~spec.eligible, rows, columns, 0
    )
    every = np.ones((HEADS, N, N), bool)
    pairs = every if spec.eligible is None else spec.eligible.dense(N, num_heads=HEADS)
    found = []
    for b in range(len(q)):
        values = np.zeros(eligible.shape)
        for h in range(HEADS):
            mine = q[b, :, h].astype(np.float64) * (spec.score.scale or 8**-0.5)
            keys = k[b, :, h // (HEADS // KV_HEADS)].astype(np.float64)
            for r, row in enumerate(rows):
                for c, column in enumerate(columns):
                    values[h, r, c] = (
                        gate[h, r, c]
                        if spec.score.is_operand
                        else cell_score(
                            spec.score.by, mine, keys, row, column, pairs[h]
                        )
                    )
        found.append(decided(spec, values, forced, eligible, eligible & ~broken))
    return np.array(found)


def decided(spec, values, forced, eligible, whole):
    """The chosen cells of one entry of the batch."""
    sets = []  # lists of (h, r, c) that compete; heads that share a choice first
    heads, rows, columns = values.shape
    cells = list(np.ndindex(values.shape))
    match spec.scope:
        case "query" | "group" | "shared":
            sets = [[x for x in cells if x[:2] == hr] for hr in np.ndindex(heads, rows)]
        case "head":
            sets = [[x for x in cells if x[0] == h] for h in range(heads)]
        case "block":
            sets = [[x for x in cells if x[2] == c] for c in range(columns)]
        case "overall":
            sets = [cells]
    weights = {}
    for each in sets:
        weights |= normalised(spec.score.normalise, values, eligible, whole, each)
    together = {"group": HEADS // KV_HEADS, "shared": heads}.get(spec.scope, 1)
    for h, r, c in cells if together > 1 else ():
        if h % together == 0:
            alike = [(h + i, r, c) for i in range(together)]
            weights |= dict.fromkeys(alike, np.mean([weights[x] for x in alike]))
    kept = np.zeros(values.shape, bool)
    for each in sets:
        for x in winners(spec, weights, forced, eligible, each, columns):
            kept[x] = True
    if spec.rules.otherwise == "eligible" and not (kept & ~forced).any():
        return eligible
    return kept | forced


def normalised(how, values, eligible, whole, cells):
    valid = [x for x in cells if eligible[x] and np.isfinite(values[x])]
    match how:
        case "softmax" | "whole_softmax":
            some = valid if how == "softmax" else [x for x in valid if whole[x]]
            total = sum(np.exp(values[x]) for x in some)
            return {x: np.exp(values[x]) / total if x in some else 0.0 for x in cells}
        case "minmax":
            low, high = (f([values[x] for x in valid]) for f in (min, max))
            extent = high - low if high - low > 1e-6 else 1.0
            return {x: (values[x] - low) / extent for x in cells}
    return {x: values[x] for x in cells}


def winners(spec, weights, forced, eligible, cells, columns):
    valid = [x for x in cells if eligible[x] and np.isfinite(weights[x])]
    best = sorted((x for x in valid if not forced[x]), key=lambda x: -weights[x])
    at_least = best[: spec.rules.at_least]
    in_force = sum(forced[x] for x in cells) if spec.rules.forced_counts else 0
    match type(spec).__name__:
        case "TopK":
            size = len(cells) // columns
            k = spec.k if isinstance(spec.k, int) else 3
            return best[: max(0, k * size - in_force)] + at_least
        case "Threshold":
            return [x for x in best if weights[x] > spec.t] + at_least
    total = sum(max(weights[x], 0) for x in valid)
    total += 1e-6 if spec.score.normalise == "minmax" else 0
    mine = [x for x in valid if forced[x]] if spec.rules.forced_counts else []
    held = sum(max(weights[x], 0) for x in mine)
    taken = []
    for x in best:
        if held >= spec.p * total:
            break
        taken.append(x)
        held += max(weights[x], 0)
    return taken + at_least
