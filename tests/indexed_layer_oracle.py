"""Layers with an indexer by their definition: float64 NumPy, dense masks, no compiler.

Each function is written from the published model, with the names of its parameters. It
gives the heads' outputs, the choice, and what the loss of the indexer needs.
"""

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """``out``; and by query and cell: mask, scores, which cells compete, attention."""

    out: np.ndarray
    mask: np.ndarray  # [batch, heads or 1, q, k]: which keys a query sees
    scores: np.ndarray  # [batch, choices, q, cells]
    eligible: np.ndarray  # [q, cells]
    chosen: np.ndarray  # [batch, choices, q, cells]
    logits: np.ndarray  # [batch, heads, q, k]
    sink: np.ndarray | None
    block: int
    first: int = 0  # the first key that is in a cell


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


def turn(x, channels, layout, side="first", at=None, alpha=0.0, theta=10000.0):
    """Rotates pairs of channels of ``x [b, seq, heads, dim]`` as complex numbers."""
    x = x.copy()
    at = np.arange(x.shape[1]) if at is None else at
    rate = theta ** (-2 * np.arange(channels // 2) / channels) * np.exp(alpha)
    phase = np.exp(1j * at[:, None] * rate)[None, :, None]
    first = 0 if side == "first" else x.shape[-1] - channels
    part = x[..., first : first + channels]
    real, imaginary = slice(0, None, 2), slice(1, None, 2)
    if layout == "half":
        real, imaginary = slice(0, channels // 2), slice(channels // 2, None)
    z = (part[..., real] + 1j * part[..., imaginary]) * phase
    part[..., real], part[..., imaginary] = z.real, z.imag
    return x


def best(scores, k):
    """The ``k`` greatest finite entries of each row; ties to the lower index."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found & np.isfinite(scores)


def weights_of(logits, mask, sink=None):
    """The softmax over visible keys and the sink; 0 for a query that sees nothing."""
    masked = np.where(mask, logits, -np.inf)
    top = masked.max(-1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink[None, :, None, None])
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(masked - top)
    total = e.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink[None, :, None, None] - top)
    return e / np.where(total == 0, 1, total)


def index_scores(iq, ik, weights, scale):
    """DeepSeek's scores, of one choice: ``[batch, 1, q, cells]``."""
    s = np.maximum(np.einsum("bqhd,bkd->bqhk", iq, ik) * scale, 0)
    return np.einsum("bqhk,bqh->bqk", s, weights)[:, None]


def causal(n):
    return np.tril(np.ones((n, n), bool))


def latents(p, x, turned, layout, q_norm=True):
    """Queries, keys and values of MLA, expanded, and the query latent."""
    alpha = p.get("rotary_stretch", 0.0)
    source = rms(x @ p["query_latent"], p["query_norm"]) if q_norm else x
    q = np.einsum("bsr,rhd->bshd", source, p["query"])
    row = x @ p["latent"]
    rank = p["kv_b"].shape[2]
    c = rms(row[..., :rank], p["latent_norm"])
    rope = row[..., None, rank:]
    if turned:
        q = turn(q, turned, layout, "last", alpha=alpha)
        rope = turn(rope, turned, layout, "last", alpha=alpha)
    both = np.einsum("bsr,hcr->bshc", c, p["kv_b"])
    d_n = q.shape[-1] - turned
    rope = np.broadcast_to(rope, (*both.shape[:3], turned))
    return q, np.concatenate([both[..., :d_n], rope], -1), both[..., d_n:], source


def index_arrays(p, x, source, rotate, eps=1e-6):
    iq = rotate(np.einsum("bsr,rhd->bshd", source, p["index_query"]))
    ik = x @ p["index_key"]
    ik = layer_norm(ik, p["index_key_norm"], p["index_key_norm_bias"], eps)
    return iq, rotate(ik[:, :, None])[:, :, 0]


def head_weights(p, x):
    w = x @ p["index_weight"]
    return w * w.shape[-1] ** -0.5


def grouped_logits(q, k, scale=None):
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return np.einsum("bqhd,bkhd->bhqk", q, k) * scale


def finished(p, x, logits, v, mask, scores, eligible, chosen, block=1):
    """The softmax, the sink, the gate, and the output projection."""
    sink = p.get("sink")
    w = weights_of(logits, mask, sink)
    v = np.repeat(v, logits.shape[1] // v.shape[2], axis=2)
    out = np.einsum("bhqk,bkhd->bqhd", w, v)
    if "gate" in p:
        out = out * sigmoid(np.einsum("bsf,fhd->bshd", x, p["gate"]))
    y = np.einsum("bqhd,hdf->bqf", out, p["out"])
    return Run(y, mask, scores, eligible, chosen, logits, sink, block)


def by_token(p, x, k, parts, iq, ik, temperature=None):
    """A choice of single causal keys by the lightning indexer."""
    q, keys, v = parts
    n = x.shape[1]
    scores = index_scores(iq, ik, head_weights(p, x), ik.shape[-1] ** -0.5)
    chosen = best(np.where(causal(n), scores, -np.inf), k)
    if temperature is not None:
        q = q * temperature
    logits = grouped_logits(q, keys)
    return finished(p, x, logits, v, chosen, scores, causal(n), chosen)


def deepseek_v32(p, x, k):
    *parts, source = latents(p, x, 2, "interleaved")
    iq, ik = index_arrays(p, x, source, lambda y: turn(y, 2, "half"))
    return by_token(p, x, k, parts, iq, ik)


def glm_5(p, x, k):
    *parts, source = latents(p, x, 4, "interleaved")
    iq, ik = index_arrays(p, x, source, lambda y: turn(y, 4, "interleaved"))
    return by_token(p, x, k, parts, iq, ik)


def glm_5_reused(p, x, chosen):
    """A layer that sees the pairs that an earlier one chose."""
    q, keys, v, _ = latents(p, x, 4, "interleaved")
    return finished(p, x, grouped_logits(q, keys), v, chosen, None, None, chosen)


def hy_v4(p, x, k):
    *parts, source = latents(p, x, 4, "half")
    rotate = lambda y: turn(y, 4, "half", "last")
    iq, ik = index_arrays(p, x, source, rotate, 1e-5)
    return by_token(p, x, k, parts, iq, ik)


def by_log(scale, bias, n):
    """``scale ln(t + 1) + bias``, as ``[1, seq, heads, 1]``."""
    return (np.log(np.arange(n) + 1)[:, None] * scale + bias)[None, :, :, None]


def mistral_large_4(p, x, k):
    n = x.shape[1]
    *parts, _ = latents(p, x, 4, "interleaved", q_norm=False)
    source = layer_norm(x, p["index_input"], p["index_input_bias"])
    rotate = lambda y: turn(y, 4, "interleaved", alpha=p["rotary_stretch"])
    iq, ik = index_arrays(p, x, source, rotate)
    iq = iq * by_log(p["index_log_scale"], p["index_log_bias"], n)
    temperature = by_log(p["log_scale"], p["log_bias"], n)
    return by_token(p, x, k, parts, iq, ik, temperature)


def by_pool(scores, n, k, block):
    """Whole cells before a query, the best ``k``, and the tokens of the rest."""
    q, key, cell = np.arange(n)[:, None], np.arange(n), np.arange(scores.shape[-1])
    whole = (cell + 1) * block <= q + 1
    chosen = best(np.where(whole, scores, -np.inf), k)
    of_key = np.zeros((*chosen.shape[:-1], n), bool)
    spread = np.repeat(chosen, block, axis=-1)
    of_key[..., : spread.shape[-1]] = spread
    rest = (key >= (q + 1) // block * block) & (key <= q)
    return whole, chosen, of_key | rest


def glm_5_next(p, x, k, block=4):
    n = x.shape[1]
    q, keys, v, source = latents(p, x, 0, None)
    iq = np.einsum("bsr,rhd->bshd", source, p["index_query"])
    ik = x @ p["index_key"]
    ik = layer_norm(ik, p["index_key_norm"], p["index_key_norm_bias"])
    gate, pools = x @ p["index_key_gate"], []
    for first in range(0, n - block + 1, block):
        own = slice(first, first + block)
        e = np.exp(gate[:, own] + p["index_key_place"])
        pools.append((e / e.sum(1, keepdims=True) * ik[:, own]).sum(1))
    pools = np.stack(pools, axis=1)
    scores = index_scores(iq, pools, head_weights(p, x), iq.shape[-1] ** -0.5)
    whole, chosen, mask = by_pool(scores, n, k // block, block)
    logits = grouped_logits(q, keys)
    return finished(p, x, logits, v, mask, scores, whole, chosen, block)


def grouped(p, x, turned):
    """Queries, keys and values with norms of a weight that is stored less 1."""
    q, k, v = (
        np.einsum("bsf,fhd->bshd", x, p[name]) for name in ("query", "key", "value")
    )
    q, k = rms(q, 1 + p["query_norm"]), rms(k, 1 + p["key_norm"])
    return turn(q, turned, "half"), turn(k, turned, "half"), v


def minimax_m3(p, x, k, block=4):
    n = x.shape[1]
    q, keys, v = grouped(p, x, 2)
    iq = np.einsum("bsf,fhd->bshd", x, p["index_query"])
    iq = turn(rms(iq, 1 + p["index_query_norm"]), 2, "half")
    ik = rms(x @ p["index_key"], 1 + p["index_key_norm"])
    ik = turn(ik[:, :, None], 2, "half")[:, :, 0]
    pairs = np.where(causal(n), np.einsum("bqhd,bkd->bhqk", iq, ik), -np.inf)
    cells = -(-n // block)
    pad = cells * block - n
    wide = np.pad(pairs, [(0, 0)] * 3 + [(0, pad)], constant_values=-np.inf)
    scores = wide.reshape(*wide.shape[:3], cells, block).max(-1)
    own = np.arange(n)[:, None] // block == np.arange(cells)
    chosen = best(np.where(own, 1e9, scores), k)
    mask = np.repeat(chosen, block, axis=-1)[..., :n] & causal(n)
    mask = np.repeat(mask, q.shape[2] // mask.shape[1], axis=1)
    eligible = np.isfinite(scores[0, 0])
    logits = grouped_logits(q, keys)
    return finished(p, x, logits, v, mask, scores, eligible, chosen, block)


def qwen4_exp(p, x, k, block=4):
    n = x.shape[1]
    q, keys, v = grouped(p, x, 2)
    iq = np.einsum("bsf,fhd->bshd", x, p["index_query"])
    iq = turn(rms(iq, 1 + p["index_query_norm"]), 2, "half")
    raw, means = x @ p["index_key"], []
    for first in range(0, n - block + 1, block):
        means.append(raw[:, first : first + block].mean(1))
    ik = rms(np.stack(means, axis=1), 1 + p["index_key_norm"])
    at = np.arange(ik.shape[1]) * block
    ik = turn(ik[:, :, None], 2, "half", at=at)[:, :, 0]
    ones = np.ones(iq.shape[:3])
    scores = index_scores(iq, ik, ones, iq.shape[-1] ** -0.5)
    whole, chosen, mask = by_pool(scores, n, k // block, block)
    logits = grouped_logits(q, keys)
    return finished(p, x, logits, v, mask, scores, whole, chosen, block)


def overlapped(p, name, x, ratio, overlap):
    """Entries of ``ratio`` tokens, one at a time, before the rotation."""
    c, z = x @ p[name], x @ p[f"{name}_gate"]
    b, dim, made = p[f"{name}_place"], p[f"{name}_norm"].shape[0], []
    for j in range(x.shape[1] // ratio):
        own = slice(j * ratio, (j + 1) * ratio)
        rows, logits = [c[:, own, -dim:]], [z[:, own, -dim:] + b[:, -dim:]]
        if overlap and j:
            past = slice((j - 1) * ratio, j * ratio)
            rows.append(c[:, past, :dim])
            logits.append(z[:, past, :dim] + b[:, :dim])
        e = np.exp(np.concatenate(logits, 1))
        made.append((e * np.concatenate(rows, 1)).sum(1) / e.sum(1))
    return rms(np.stack(made, axis=1), p[f"{name}_norm"])


def deepseek_v4(p, x, k, ratio=4, near=5, theta=160000.0):
    n = x.shape[1]
    rotate = lambda y, at=None: turn(y, 4, "interleaved", "last", at, theta=theta)
    source = rms(x @ p["query_latent"], p["query_norm"])
    q = np.einsum("bsr,rhd->bshd", source, p["query"])
    q = rotate(rms(q, 1.0))
    kv = rotate(rms(x @ p["key"], p["key_norm"])[:, :, None])
    at, entry = np.arange(n), np.arange(n // ratio if ratio else 0)
    seen = (at[:, None] >= at) & (at[:, None] - at < near)
    scores = whole = chosen = None
    if ratio:
        first = entry * ratio
        entries = overlapped(p, "entry", x, ratio, ratio == 4)[:, :, None]
        kv = np.concatenate([kv, rotate(entries, first)], 1)
        whole = entry < (at[:, None] + 1) // ratio
        chosen = np.broadcast_to(whole, (len(x), 1, *whole.shape))
        if ratio == 4:
            iq = rotate(np.einsum("bsr,rhd->bshd", source, p["index_query"]))
            ik = overlapped(p, "index_key", x, ratio, True)[:, :, None]
            ik = rotate(ik, first)[:, :, 0]
            scores = index_scores(iq, ik, head_weights(p, x), ik.shape[-1] ** -0.5)
            chosen = best(np.where(whole, scores, -np.inf), k)
    near_pairs = np.broadcast_to(seen, (len(x), 1, n, n))
    mask = near_pairs if chosen is None else np.concatenate([near_pairs, chosen], -1)
    w = weights_of(grouped_logits(q, kv), mask, p["sink"])
    out = np.einsum("bhqk,bkd->bqhd", w, kv[:, :, 0])
    out = turn(out, 4, "interleaved", "last", -at, theta=theta)
    groups = p["out_group"].shape[0]
    out = out.reshape(*out.shape[:2], groups, -1, out.shape[-1])
    low = np.einsum("bqghd,ghdr->bqgr", out, p["out_group"])
    y = np.einsum("bqgr,grf->bqf", low, p["out"])
    logits = grouped_logits(q, kv)
    return Run(y, mask, scores, whole, chosen, logits, p["sink"], 1, n)


def divergence(run, logits=None, sink=None):
    """The loss of the indexer: a mean over queries of KL divergences.

    ``logits`` and ``sink`` of another run stay in the place of its own: they are
    detached. A run that chooses all cells has the loss of the dense warm-up.
    """
    logits = run.logits if logits is None else logits
    w = weights_of(logits, run.mask, run.sink if sink is None else sink)
    w = w.reshape(len(w), run.scores.shape[1], -1, *w.shape[2:]).sum(2)
    cells, block = run.scores.shape[-1], run.block
    w = w[..., run.first :]
    pad = max(0, cells * block - w.shape[-1])
    w = np.pad(w, [(0, 0)] * 3 + [(0, pad)])[..., : cells * block]
    mass = w.reshape(*w.shape[:3], cells, block).sum(-1)
    allowed = run.chosen & run.eligible
    mass = np.where(allowed, mass, 0)
    total = mass.sum(-1, keepdims=True)
    share = mass / np.where(total == 0, 1, total)
    s = np.where(allowed, run.scores, -np.inf)
    top = s.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(s - top)
    all_e = e.sum(-1, keepdims=True)
    log_p = np.where(allowed, s - top, 0) - np.log(np.where(all_e == 0, 1, all_e))
    log_share = np.log(np.where(share > 0, share, 1))
    return np.mean(np.sum(np.where(share > 0, share * (log_share - log_p), 0), -1))
