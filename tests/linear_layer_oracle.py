"""Linear layers by their definition: float64 NumPy, one token and head at a time.

Each layer is written from its paper, with the names of its parameters. The documents of
``ids [seq]``, if given, are computed one by one.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def convolved(weight, q, k, v):
    """Each channel of q, k and v with its three predecessors."""
    n = len(q)
    flat = np.concatenate([x.reshape(n, -1) for x in (q, k, v)], axis=1)
    out, width = np.zeros_like(flat), weight.shape[1]
    for t in range(n):
        for back in range(min(width, t + 1)):
            out[t] += weight[:, width - 1 - back] * flat[t - back]
    sizes = np.cumsum([q[0].size, k[0].size])
    parts = np.split(out, sizes, axis=1)
    return [x.reshape(y.shape) for x, y in zip(parts, (q, k, v), strict=True)]


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def mapped(p, name, x):
    """``x`` through one linear map, or two."""
    if f"{name}_in" in p:
        x = x @ p[f"{name}_in"]
    return np.tensordot(x, p[name], 1)


def normed(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def projections(p, x):
    return [np.tensordot(x, p[name], 1) for name in ("query", "key", "value")]


def linear_attention(p, x):
    q, k, v = projections(p, x)
    q, k = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (q, k))
    out = np.zeros_like(v)
    for t, h in np.ndindex(v.shape[:2]):
        w = k[: t + 1, h] @ q[t, h]
        out[t, h] = w @ v[: t + 1, h] / (w.sum() + 1e-10)
    return out


def gated_linear_attention(p, x):
    q, k, v = projections(p, x)
    keep = sigmoid(mapped(p, "decay", x) + p["decay_bias"]) ** (1 / 16)
    out = np.zeros_like(v)
    for h in range(v.shape[1]):
        s = np.zeros((q.shape[2], v.shape[2]))
        for t in range(len(x)):
            s = keep[t, h][:, None] * s + np.outer(k[t, h], v[t, h])
            out[t, h] = q[t, h] @ s * q.shape[2] ** -0.5
    return normed(out, p["norm"], 1e-5) * silu(mapped(p, "gate", x))


def by_delta_rule(p, x, log_decay, beta):
    """``log_decay``: ``[seq, value heads]``, or also by channel."""
    q, k, v = (silu(y) for y in convolved(p["conv"], *projections(p, x)))
    q, k = unit(q) * q.shape[2] ** -0.5, unit(k)
    group, out = v.shape[1] // k.shape[1], np.zeros_like(v)
    for h in range(v.shape[1]):
        s, g = np.zeros((q.shape[2], v.shape[2])), h // group
        for t in range(len(x)):
            s = np.exp(log_decay[t, h]).reshape(-1, 1) * s
            error = v[t, h] - k[t, g] @ s
            s = s + beta[t, h] * np.outer(k[t, g], error)
            out[t, h] = q[t, g] @ s
    return out


def delta_net(p, x):
    beta = sigmoid(mapped(p, "beta", x))
    return normed(by_delta_rule(p, x, np.zeros_like(beta), beta), p["norm"], 1e-5)


def gated_delta_net(p, x):
    g = -np.exp(p["A_log"]) * softplus(mapped(p, "decay", x) + p["dt_bias"])
    out = by_delta_rule(p, x, g, 2 * sigmoid(mapped(p, "beta", x)))
    return normed(out, p["norm"], 1e-6) * silu(mapped(p, "gate", x))


def kimi_delta(p, x):
    rate = np.exp(p["A_log"])[:, None]
    g = -rate * softplus(mapped(p, "decay", x) + p["dt_bias"])
    out = by_delta_rule(p, x, g, sigmoid(mapped(p, "beta", x)))
    return normed(out, p["norm"], 1e-5) * sigmoid(mapped(p, "gate", x))


def ling(p, x):
    rate = np.exp(p["A_log"])[:, None]
    g = -5 * sigmoid(rate * (mapped(p, "decay", x) + p["dt_bias"]))
    out = by_delta_rule(p, x, g, sigmoid(mapped(p, "beta", x)))
    return normed(out, p["norm"], 1e-6) * sigmoid(mapped(p, "gate", x))


def light_net(p, x):
    q, k, v = projections(p, x)
    q, out = silu(q), np.zeros_like(v)
    for t, h in np.ndindex(v.shape[:2]):
        share = np.exp(k[: t + 1, h])
        share = share / share.sum(axis=0)
        out[t, h] = q[t, h] @ (share.T @ v[: t + 1, h]) * q.shape[2] ** -0.5
    flat = normed(out.reshape(len(x), -1), p["norm"].reshape(-1), 1e-5)
    return flat.reshape(out.shape) * silu(mapped(p, "gate", x))


def layer(function, params, x, ids=None):
    """The layer on ``x [batch, seq, features]``; ids ``[batch, seq]`` in order."""
    p = {name: np.asarray(y, np.float64) for name, y in params.items()}
    out = []
    for b, row in enumerate(np.asarray(x, np.float64)):
        row_ids = np.zeros(len(row)) if ids is None else ids[b]
        cuts = np.flatnonzero(np.diff(row_ids)) + 1
        found = [function(p, piece) for piece in np.split(row, cuts)]
        out.append(np.concatenate(found).reshape(len(row), -1))
    return np.stack(out) @ p["out"].reshape(-1, p["out"].shape[-1])
