"""Linear attention by its definition: all pairs, in NumPy's float64."""

import jax.numpy as jnp
import numpy as np

import sadsl as sa

CHUNK = sa.KernelConfig(block_kv=16)
DOCUMENTS = sa.causal() & sa.segments()


def arrays(q_seq=20, kv_seq=20, heads=4, kv_heads=2, dim=6, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    shapes = (q_seq, heads), (kv_seq, kv_heads), (kv_seq, kv_heads)
    return [
        jnp.asarray(rng.normal(size=(batch, *shape, dim)), "float32")
        for shape in shapes
    ]


def ids(seq, *, ordered=True, seed=1, batch=2):
    found = np.random.default_rng(seed).integers(0, 4, (batch, seq))
    return jnp.asarray(np.sort(found) if ordered else found)


def log_decays(seq, heads, seed=2, batch=2):
    return -jnp.asarray(
        np.random.default_rng(seed).exponential(size=(batch, seq, heads)), "float32"
    )


def definition(features, q, k, v, pairs, log_decay=None, eps=1e-10, offset=0):
    """Out and lse over all pairs, in NumPy's float64; ``[batch, seq, heads, dim]``."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    w = np.einsum("bqhd,bkhd->bhqk", features(q), features(k)) * pairs
    if log_decay is not None:
        g = np.asarray(log_decay, np.float64)
        g = np.repeat(g, q.shape[2] // g.shape[2], axis=2)
        for i in range(q.shape[1]):
            for j in range(k.shape[1]):
                steps = g[:, j + 1 : i + offset + 1].sum(axis=1)
                w[:, :, i, j] *= np.exp(np.minimum(steps, 0))
    out = np.einsum("bhqk,bkhd->bqhd", w, v)
    if eps is None:
        return out, None
    total = w.sum(axis=3)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(np.abs(total + eps)), -np.inf)
    return out / (np.swapaxes(total, 1, 2)[..., None] + eps), lse


def elu1_of(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def pairs_of(spec, q_ids, kv_ids, offset=0):
    """The pairs of a map, ``[batch, 1, q, kv]``, from its dense array."""
    q_seq, kv_seq = q_ids.shape[1], kv_ids.shape[1]
    each = [
        spec.dense(offset + q_seq, max(kv_seq, offset + q_seq), operands={
            "q_segment_ids": np.pad(np.asarray(a), (offset, 0)),
            "kv_segment_ids": np.pad(np.asarray(b), (0, offset + q_seq)),
        })[:, offset:, :kv_seq]
        for a, b in zip(q_ids, kv_ids, strict=True)
    ]  # fmt: skip
    return np.stack(each)


def options(term, q_ids, kv_ids):
    if not term.kind.segments:
        return {}
    return {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
