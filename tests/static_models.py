"""Layers of models with static maps, and the vectors that have their arrays."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import sadsl as sa
from sadsl.catalog import models

FOX = sa.gate_bias("g")


@dataclass(frozen=True)
class Row:
    """A layer of a model, and the case that has its arrays.

    ``rename`` has the operands of the spec by the names of the arrays. ``tau`` makes
    the factor of each query that the array ``q`` already holds.
    """

    file: str
    case: str
    spec: object
    rename: tuple[tuple[str, str], ...] = ()
    tau: object = None


def llama_factor(t):
    return 1 + 0.1 * np.log1p((t + 1) // 8)


def mistral_factor(t):
    return 1 + 0.1 * np.log1p(t // 16)


def inkling_factor(t):
    return 1 + 0.1 * np.log(np.maximum((t + 1) / 12, 1))


SINK = (("sinks", "sink"),)
REL = (("rel_q", "rel_q"), ("rel_table", "rel_table"))
INKLING = {"near": 8, "extent": 20, "channels": 4}
TEMPERED = models.inkling(6, **INKLING, floor=12)
FIRST, SECOND, INNER, OUTER = 0, 1, 0, 5

ROWS = [
    Row("gpt_oss", "sliding", models.gpt_oss(2, near=16)[FIRST], SINK),
    Row("gpt_oss", "full", models.gpt_oss(2, near=16)[SECOND], SINK),
    Row("gemma2", "sliding", models.gemma_2(2, near=12, cap=5.0)[FIRST]),
    Row("gemma2", "full", models.gemma_2(2, near=12, cap=5.0)[SECOND]),
    Row("gemma3", "sliding", models.gemma_3(6, near=12)[INNER]),
    Row("gemma3", "full", models.gemma_3(6, near=12)[OUTER]),
    Row("gemma3_bidirectional", "sliding", models.embedding_gemma(6, near=12)[INNER]),
    Row("gemma3_bidirectional", "full", models.embedding_gemma(6, near=12)[OUTER]),
    Row("gemma4", "sliding", models.gemma_4(6, near=12)[INNER]),
    Row("gemma4", "full_k_eq_v", models.gemma_4(6, near=12)[OUTER]),
    Row("olmo3", "sliding", models.olmo_3(4, near=10)[0]),
    Row("olmo3", "full", models.olmo_3(4, near=10)[3]),
    Row("cohere2", "sliding_rope", models.cohere_2(4, near=10)[0]),
    Row("cohere2", "full_nope", models.cohere_2(4, near=10)[3]),
    Row("smollm3", "rope", models.smollm_3(4)[0]),
    Row("llama4", "chunked_rope", models.llama_4(4, chunk=16, floor=8)[0]),
    Row(
        "llama4", "full_nope_temperature", models.llama_4(4, chunk=16, floor=8)[3],
        tau=llama_factor,
    ),
    Row("modernbert", "full", models.modernbert(3, near=16)[0]),
    Row("modernbert", "sliding", models.modernbert(3, near=16)[1]),
    Row("mimo_v2_flash", "full", models.mimo_v2_flash(6, near=14)[0]),
    Row("mimo_v2_flash", "sliding", models.mimo_v2_flash(6, near=14)[1], SINK),
    Row("granite_swa", "full", models.granite_swa(4, near=12)[0], SINK),
    Row("granite_swa", "sliding", models.granite_swa(4, near=12)[1], SINK),
    Row("longcat_flash", "first_of_block", models.longcat_flash(1)[0]),
    Row("mistral4", "layer1", models.mistral_4(1, original=16)[0], tau=mistral_factor),
    Row("inkling", "sliding", models.inkling(6, **INKLING)[INNER], REL),
    Row("inkling", "full", TEMPERED[OUTER], REL, inkling_factor),
    Row("inkling2", "sliding", models.inkling_2(6, **INKLING)[INNER], SINK + REL),
    Row("inkling2", "full", models.inkling_2(6, **INKLING)[OUTER], SINK + REL),
    Row(
        "fla_forgetting_attn", "full", sa.softmax(sa.causal(), bias=FOX), (("g", "g"),)
    ),
    Row(
        "fla_forgetting_attn", "window",
        sa.softmax(sa.causal() & sa.window(8), bias=FOX), (("g", "g"),),
    ),
    Row(
        "fla_attn_sink_and_gate", "window",
        sa.softmax(sa.causal() & sa.window(9), bias=FOX, sink=True),
        (("g", "g"), *SINK),
    ),
]  # fmt: skip


def inputs_of(row, arrays):
    """What has gradients, by the names of the arrays; q without its factor."""
    core = ("q", "k", "v")
    if "latent" in arrays:
        core = ("q", "latent", "k_rope", "kv_b")
    names = (*core, *(name for name, _ in row.rename))
    given = {name: np.asarray(arrays[name], np.float32) for name in names}
    n = given["q"].shape[1]
    tau = np.ones(n) if row.tau is None else row.tau(np.arange(n))
    tau = tau[None, :, None, None]
    given["q"] = (given["q"] / tau).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in given.items()}, tau
