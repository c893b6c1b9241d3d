"""Published recurrences as loops over tokens in float64, on ``[batch, seq, ...]``.

Each function takes arrays by name and returns the outputs and the last state. Heads of
k, and of what belongs to keys, are repeated for those of v.
"""

import numpy as np


def _all_heads(a, *names):
    heads = a["v"].shape[2]
    return [np.repeat(a[x], heads // a[x].shape[2], axis=2) for x in names]


def _loop(a, k, q, step):
    """``step(s, t) -> s``; q reads after each token, scaled by ``a["scale"]``."""
    batch, _, heads, dim = k.shape
    s, out = np.zeros((batch, heads, dim, a["v"].shape[-1])), []
    for t in range(q.shape[1]):
        s = step(s, t)
        out.append(np.einsum("bhk,bhkv->bhv", a["scale"] * q[:, t], s))
    return np.stack(out, axis=1), s


def _outer(x, y):
    return x[..., :, None] * y[..., None, :]


def _read(x, s):
    return np.einsum("bhk,bhkv->bhv", x, s)


def _unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def _factors(g):
    """Factors of the state ``[batch, seq, heads, dim or 1, 1]``."""
    return np.exp(g if g.ndim == 4 else g[..., None])[..., None]


def added(a):
    """Keys and values are added to a state that decays."""
    q, k = _all_heads(a, "q", "k")
    keep = _factors(a.get("g", np.zeros(k.shape[:3])))

    def step(s, t):
        return keep[:, t] * s + _outer(k[:, t], a["v"][:, t])

    return _loop(a, k, q, step)


def light_net(a):
    """Each channel's mean of the values, weighted by the exponentials of its keys."""
    out, k = [], a["k"]
    for t in range(k.shape[1]):
        w = np.exp(k[:, : t + 1] - k[:, : t + 1].max(axis=1, keepdims=True))
        s = np.einsum("bjhk,bjhv->bhkv", w / w.sum(axis=1, keepdims=True),
                      a["v"][:, : t + 1])  # fmt: skip
        out.append(_read(a["scale"] * a["q"][:, t], s))
    return np.stack(out, axis=1), s


def rwkv6(a):
    """The old state and, by a bonus, the own key."""
    q, k, v = a["q"], a["k"], a["v"]
    s, out = np.zeros((len(k), *k.shape[2:], v.shape[-1])), []
    for t in range(k.shape[1]):
        own = _outer(k[:, t], v[:, t])
        out.append(_read(a["scale"] * q[:, t], s + a["u"][None, :, :, None] * own))
        s = np.exp(a["w"][:, t])[..., None] * s + own
    return np.stack(out, axis=1), s


def delta(a):
    """What "e" reads is taken away; several keys a token; "w" writes."""
    q, k = _all_heads(a, "q", "k")
    if a.get("unit", True):
        q, k = _unit(q), _unit(k)
    erase = _all_heads(a, "e")[0] if "e" in a else k
    steps = k.shape[1] // q.shape[1]
    keep = _factors(a.get("g", np.zeros((*q.shape[:2], k.shape[2]))))
    beta = a.get("beta", np.ones(k.shape[:3]))

    def step(s, t):
        s = keep[:, t] * s
        for i in range(t * steps, t * steps + steps):
            error = a["v"][:, i] - _read(erase[:, i], s)
            s = s + _outer(k[:, i], beta[:, i, :, None] * error)
        return s

    return _loop(a, k, q, step)


def rwkv7(a):
    """A diagonal plus a matrix of rank one; "a" reads the old state."""
    keep = _factors(a["g"])

    def step(s, t):
        moved = _outer(a["b"][:, t], _read(a["a"][:, t], s))
        return keep[:, t] * s + moved + _outer(a["k"][:, t], a["v"][:, t])

    return _loop(a, a["k"], a["q"], step)


def preconditioned(k, g, weight):
    """Keys divided by a power of the running size of their channel; the last size."""
    size, out = np.zeros((len(k), *k.shape[2:])), []
    for t in range(k.shape[1]):
        size = np.exp(g[:, t])[..., None] * size
        size = size + weight[:, t, :, None] * k[:, t] ** 2
        r = np.log(size + 1e-6) + 0.2
        out.append(k[:, t] * 1.5 ** (-r / (1 + np.abs(r))))
    return np.stack(out, axis=1), size
