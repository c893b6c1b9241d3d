"""Models with static maps: schedules, and each kind of layer against its own code.

Outputs and gradients of ``tests/vectors`` are those of other people's code, within 3e-6
of the greatest entry of each array.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors_of import assert_agrees, cases

import sadsl as sa
from sadsl.catalog import models

CAUSAL = sa.softmax(sa.causal())
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


def called(row, options, given, impl):
    read = {operand: given[name] for name, operand in row.rename}
    keys = {"k": given.get("k"), "v": given.get("v")}
    if "latent" in given:
        kv = jnp.concatenate([given["latent"], given["k_rope"]], axis=-1)
        keys, read = {"k": kv, "v": kv}, {"kv_b": given["kv_b"]}
    return sa.attention(
        given["q"], **keys, spec=row.spec, operands=read, sm_scale=options["scale"],
        impl=impl, interpret=impl in ("tpu", "triton"),
    )  # fmt: skip


def agrees(row, impl):
    arrays, options = cases(row.file)[row.case]
    given, tau = inputs_of(row, arrays)

    def total(given):
        out = called(row, options, given, impl)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weight), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(given)
    what = f"{row.file} {row.case}"
    assert_agrees(out, arrays["out"], f"{what}: out")
    for name, gradient in gradients.items():
        gradient = gradient / tau if name == "q" else gradient
        assert_agrees(gradient, arrays[f"d_{name}"], f"{what}: d_{name}")


def marked(row):
    """One row runs in the fast suite: it has a window, a bias and sinks of queries."""
    name = f"{row.file}-{row.case}"
    marks = [] if name == "inkling2-sliding" else pytest.mark.slow
    return pytest.param(row, id=name, marks=marks)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("row", [marked(row) for row in ROWS])
def test_layers_of_published_models(row):
    agrees(row, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "tpu", "triton"])
@pytest.mark.parametrize(
    "row", [ROWS[1], ROWS[26], ROWS[27], ROWS[31]],
    ids=lambda row: f"{row.file}-{row.case}",
)  # fmt: skip
def test_layers_on_other_backends(row, impl):
    agrees(row, impl)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file}-{row.case}")
def test_maps_of_published_models(row):
    """The mask that the original made is the map of the spec."""
    arrays, _ = cases(row.file)[row.case]
    if "mask" not in arrays:
        assert row.file.startswith("fla")
        return
    n = arrays["q"].shape[1]
    found = row.spec.support.dense(n)
    np.testing.assert_array_equal(found[0], arrays["mask"].reshape(n, n))


# --- schedules ---


FULL = {
    # The number of layers, the full ones, and what the others see.
    "gpt_oss": (36, range(1, 36, 2), sa.causal() & sa.window(127)),
    "gemma_2": (26, range(1, 26, 2), sa.causal() & sa.window(4095)),
    "gemma_3": (26, range(5, 26, 6), sa.causal() & sa.window(511)),
    "embedding_gemma": (24, range(5, 24, 6), sa.window(256, 256)),
    "gemma_4": (30, range(5, 30, 6), sa.causal() & sa.window(511)),
    "olmo_3": (32, range(3, 32, 4), sa.causal() & sa.window(4095)),
    "cohere_2": (40, range(3, 40, 4), sa.causal() & sa.window(4095)),
    "exaone_4": (32, range(3, 32, 4), sa.causal() & sa.window(4095)),
    "afmoe": (32, range(3, 32, 4), sa.causal() & sa.window(1023)),
    "muse_spark": (62, range(1, 62, 4), sa.causal() & sa.window(2047)),
    "kolibri_1": (50, range(4, 50, 5), sa.causal() & sa.window(512)),
    "smollm_3": (36, range(36), None),
    "llama_4": (48, range(3, 48, 4), sa.causal() & sa.blocks(8192)),
    "modernbert": (22, range(0, 22, 3), sa.window(64, 64)),
    "mimo_v2_flash": (48, [0, *range(5, 48, 6)], sa.causal() & sa.window(128)),
    "granite_swa": (24, range(0, 24, 4), sa.causal() & sa.window(127)),
    "ministral_3": (34, range(34), None),
    "mistral_4": (36, range(36), None),
    "longcat_flash": (56, range(56), None),
    "inkling": (66, range(5, 66, 6), sa.causal() & sa.window(511)),
    "inkling_2": (48, range(5, 48, 6), sa.causal() & sa.window(1023)),
}


@pytest.mark.parametrize("name", FULL)
def test_schedules(name):
    made = getattr(models, name)()
    count, full, nearby = FULL[name]
    assert len(made) == count
    maps = [term.support for term in made]
    assert [i for i, x in enumerate(maps) if x in (sa.causal(), sa.full())] == [*full]
    assert {x for i, x in enumerate(maps) if i not in full} == {nearby} - {None}
    assert all(sa.parse(repr(term)) == term for term in set(made))


def test_tokens_of_an_image_see_one_another():
    """Both ways, beyond the window, and never those of another image."""
    image = np.array([-1, 0, 0, 0, 0, -1, 1, 1, -1])
    at = np.arange(9)
    same = (image[:, None] == image) & (image[:, None] >= 0)
    causal = at[:, None] >= at
    near = causal & (at[:, None] - at < 2)
    for model in (models.gemma_3, models.gemma_4):
        layers = model(6, near=2, images="image")
        for term, tokens in ((layers[0], near), (layers[5], causal)):
            found = term.support.dense(9, operands={"image": image})[0]
            np.testing.assert_array_equal(found, tokens | same)


def test_numbers_that_are_refused():
    for name in FULL:
        with pytest.raises(ValueError, match=rf"^{name}: num_\w+=0 must be at least 1"):
            getattr(models, name)(0)
    nearby = [n for n, (_, _, near) in FULL.items() if near is not None]
    for name in set(nearby) - {"llama_4"}:
        with pytest.raises(ValueError, match=rf"^{name}: near=0 must be at least 1"):
            getattr(models, name)(near=0)
    with pytest.raises(ValueError, match="llama_4: chunk=0 must be at least 1"):
        models.llama_4(chunk=0)
    with pytest.raises(ValueError, match="llama_4: floor=0 must be at least 1"):
        models.llama_4(floor=0)
    with pytest.raises(ValueError, match="mistral_4: original=0 must be at least 1"):
        models.mistral_4(original=0)
    with pytest.raises(ValueError, match="inkling: floor=0 must be at least 1"):
        models.inkling(floor=0)
    with pytest.raises(ValueError, match="extent=0 must be at least 1"):
        models.inkling_2(extent=0)
    with pytest.raises(ValueError, match="logits_soft_cap=0"):
        models.gemma_2(cap=0.0)
