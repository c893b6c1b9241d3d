"""Small cases of mechanisms that content decides, which several tests enumerate.

To add one: append a name to ``NAMES`` for each function of the catalogue, and a
``Case`` for each selection that is worth a test of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import sadsl as sa
from sadsl import catalog
from sadsl.selections import (
    chunk_budget,
    descent,
    kept_keys,
    key_positive,
    kmeans,
    lsh,
    mass,
    modalities,
    sorted_chunks,
    stripes,
    topk,
    vertical_slash,
    vertical_slash_mass,
)
from sadsl.terms.base import Spec


def nothing(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """No operands."""
    return {}


class Case(NamedTuple):
    """A spec, the arrays that it reads, and the sizes that it is made for.

    ``operands(q, k)`` gives these arrays by name, for float32 ``q`` and ``k`` of
    ``[batch, n, heads, head_dim]``. It is a function because some arrays belong to the
    tokens (a bias or a gate): it computes them from ``q`` and ``k`` row by row, with
    their batch axis. Random arrays come from a seed of their own. Where the leak is
    "block", choices look less than ``block`` tokens ahead.
    """

    spec: Spec
    operands: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]] = nothing
    n: int = 48
    num_heads: int = 2
    head_dim: int = 8
    block: int = 16


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def directions(rounds: int, columns: int) -> Callable[..., Mapping[str, Any]]:
    """Projections for ``lsh``."""
    return lambda q, k: {"projections": drawn(2, rounds, q.shape[3], columns)}


def centroids(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """Three centroids for each head."""
    return {"centroids": drawn(q.shape[2], 3, q.shape[3])}


def key_bias(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """A bias of each key, made from its own features."""
    return {"bias": np.swapaxes(k[..., 0], 1, 2)}


def predictor(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """The weights of ``factorised_topk``."""
    narrow, tall = (1, q.shape[3] + 1, 4), (q.shape[1], 8)
    shapes = {"q": narrow, "k": narrow, "down": tall, "basis": tall}
    return {f"predictor_{name}": 0.3 * drawn(*x) for name, x in shapes.items()}


def flags(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """Flags where the chunks of keys begin."""
    return {"boundaries": np.arange(k.shape[1]) % 5 == 0}


def modality(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """Modalities of the positions: text, then spans of vision and text in turn."""
    return {"modality": np.arange(k.shape[1]) // 12 % 2}


def block_gate(q: np.ndarray, k: np.ndarray) -> Mapping[str, Any]:
    """A gate over blocks of 8 tokens: a causal softmax of their mean products."""
    x, y = (z.reshape(*z.shape[:1], -1, 8, *z.shape[2:]).mean(axis=2) for z in (q, k))
    scores = np.exp(np.einsum("bihd,bjhd->bhij", x, y)) * np.tri(x.shape[1])
    gate = scores / scores.sum(axis=-1, keepdims=True)
    return {"gate": gate.astype(np.float32)}


# Functions of ``sadsl.catalog`` whose pairs content decides, and those that are no map.
NAMES: set[str] = {
    "comba",
    "delta_net",
    "gated_delta_net",
    "gated_delta_product",
    "gla",
    "hebbian",
    "hgrn2",
    "kimi_delta",
    "light_net",
    "mamba2",
    "minimax_lightning",
    "FavorFeatures",
    "favor_features",
    "performer",
    "precond_kda",
    "preconditioned_keys",
    "ret_net",
    "rwkv6",
    "rwkv7",
    "combiner_axial_horizontal",
    "combiner_axial_rowmajor",
    "combiner_axial_vertical",
    "combiner_fixed",
    "combiner_logsparse",
    "combiner_mixture",
    "routing_combiner",
    "davit_channel",
    "delta_llm",
    "reference_keys",
    "linear_and_window",
    "native_sparse_attention",
    "nsa_importance",
    "sqa",
    "dynamic_mask",
    "dynamic_mask_attention",
    "value_bias",
    "Hyper",
    "draw_hyper",
    "sparsifiner",
    "sparsifiner_loss",
    "hyper_attention",
    "reformer",
    "routing_transformer",
    "moba",
    "vmoba",
    "biformer",
    "block_sparse",
    "seer_attention",
    "nsa_topk",
    "sparsed",
    "quest",
    "kinetics",
    "minference",
    "minference_candidates",
    "mminference_q_boundary",
    "mminference_2d_boundary",
    "mminference_candidates",
    "anchor_attention",
    "dhsa",
    "hip",
    "flex_prefill",
    "snapkv",
}

NO_FORCED = {"forced_columns": 0, "forced_slashes": 0}

# Selections by name: at least one for each family, and for each option that changes
# its leak.
CASES: dict[str, Case] = {
    "lsh": Case(lsh(8, 2), directions(2, 4)),
    "lsh signs": Case(sa.causal() & lsh(8, kind="signs"), directions(1, 3)),
    "lsh chunks": Case(
        lsh(8, kind="signs", chunks=sorted_chunks(16, 0, True)), directions(1, 3)
    ),
    "lsh alone": Case(lsh(32, share=True, alone="full"), directions(1, 16)),
    "reformer": Case(catalog.reformer(8, 2, 8), directions(2, 4)),
    "reformer buckets": Case(catalog.reformer(8, 2, None), directions(2, 4)),
    "kmeans": Case(sa.causal() & kmeans(3, 12), centroids),
    "kmeans argmax": Case(
        sa.causal() & kmeans(3, members="argmax", share_qk=False), centroids
    ),
    "key_topw": Case(catalog.dynamic_mask(5), key_bias),
    "key_topw smooth": Case(catalog.dynamic_mask(9, smooth=4), key_bias),
    "key_topw shared": Case(catalog.dynamic_mask(9, shared=True), key_bias),
    "key_positive": Case(sa.causal() & key_positive(), key_bias),
    "key_positive smooth": Case(
        sa.causal() & key_positive(smooth=4), key_bias, block=4
    ),
    "sparsifiner": Case(catalog.sparsifiner(0.25, 3), predictor),
    "vertical_slash": Case(vertical_slash(6, 4, last=5, **NO_FORCED)),
    "vertical_slash modality": Case(
        modalities(1, 0) & vertical_slash(6, 4, queries=1, keys=0, **NO_FORCED),
        modality,
    ),
    "vertical_slash_mass": Case(vertical_slash_mass(0.5, last=5, least=2, **NO_FORCED)),
    "modalities": Case(sa.causal() & modalities(1, 0), modality),
    "kept_keys": Case(kept_keys(20, 8, last=4, pool=3, first=2, recent=2)),
    "stripes": Case(stripes(1.0, init=2, block=4, step=2), block=8),
    "chunk_budget": Case(chunk_budget(12, block=8, first=2, local=3, last=2), flags),
    "chunk_budget block": Case(
        chunk_budget(12, block=8, first=2, local=3, last=2, by_block=True), flags
    ),
    "descent": Case(descent(6, block_q=8, sliding_window=4), block=8),
    "moba": Case(catalog.moba(2, chunk=8)),
    "vmoba": Case(
        catalog.vmoba(
            (3, 4, 4), 2, frames=1, tile=(2, 2), cube=(2, 2, 2), scope="query"
        )
    ),
    "vmoba head": Case(
        catalog.vmoba((3, 4, 4), 1, frames=1, tile=(2, 2), cube=(2, 2, 2), tau=0.6)
    ),
    "biformer": Case(catalog.biformer((6, 8), 2, regions=3)),
    "block_sparse": Case(catalog.block_sparse(2, block=8), block=8),
    "nsa_topk": Case(catalog.nsa_topk(4, block=6)),
    "quest": Case(catalog.quest(16, page=6)),
    "kinetics": Case(catalog.kinetics(1, 2, block=8), block=8),
    "seer_attention": Case(catalog.seer_attention(0.2, block=8), block_gate, block=8),
    "sparsed": Case(catalog.sparsed(block=8, new_tokens=20)),
    "topk head": Case(
        sa.causal() & topk(2, block=8, scope="head", eligible=sa.causal())
    ),
    "mass": Case(
        sa.causal()
        & mass(0.5, block=8, block_q=1, forced=sa.blocks(8), eligible=sa.causal()),
        block=8,
    ),
}
