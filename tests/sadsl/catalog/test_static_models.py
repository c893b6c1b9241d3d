"""Models with static maps: schedules, and each kind of layer against its own code.

Outputs and gradients of ``tests/vectors`` are those of other people's code, within 3e-6
of the greatest entry of each array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from static_models import ROWS, inputs_of
from vectors_of import assert_agrees, cases

import sadsl as sa
from sadsl.catalog import models

CAUSAL = sa.softmax(sa.causal())


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
