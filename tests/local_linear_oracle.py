"""Local linear attention by its definition: one ridge regression a query, in NumPy."""

import numpy as np


def of_query(q, k, v, ridge, sm_scale):
    """The output of one query ``[d]`` for its keys ``[m, d]`` and values ``[m, dv]``.

    The weights are raw, as in the definition: ``lambda`` is the relative ridge times
    their sum.
    """
    w = np.exp(k @ q * sm_scale)
    lam = ridge * w.sum()
    z = k - q
    mu = w @ z
    sigma = (w[:, None] * z).T @ z + lam * np.eye(len(q))
    rho = np.linalg.solve(sigma, mu)
    return (w * (1 - z @ rho) / (w.sum() - mu @ rho)) @ v


def by_least_squares(q, k, v, ridge, sm_scale):
    """The same by minimising ``sum w |v - b - W (k - q)|^2 + lambda |W|^2``."""
    w = np.exp(k @ q * sm_scale)
    size, lam = len(q), ridge * w.sum()
    root = np.sqrt(w)[:, None]
    rows = np.concatenate([root, root * (k - q)], axis=1)
    penalty = np.concatenate([np.zeros((size, 1)), lam**0.5 * np.eye(size)], axis=1)
    target = np.concatenate([root * v, np.zeros((size, v.shape[1]))])
    return np.linalg.lstsq(np.concatenate([rows, penalty]), target, rcond=None)[0][0]


def attention(q, k, v, pairs, ridge, sm_scale, query=of_query):
    """``[batch, seq, heads, dim]`` on pairs ``[batch or 1, heads, q, kv]``.

    ``ridge`` has a number for each head.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(pairs[b % len(pairs), h, i])
        if len(seen):
            mine = k[b, seen, h // group], v[b, seen, h // group]
            out[b, i, h] = query(q[b, i, h], *mine, ridge[h], sm_scale)
    return out
