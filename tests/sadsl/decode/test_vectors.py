"""Decoding against the code of published models: rows of the full pass, one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from sadsl_decode import decoded
from static_models import ROWS, inputs_of
from vectors_of import assert_agrees, cases

import sadsl as sa


@pytest.mark.sample(3)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file}-{row.case}")
def test_static_models(row):
    arrays, options = cases(row.file)[row.case]
    given, _ = inputs_of(row, arrays)
    read = {operand: given[name] for name, operand in row.rename}
    k, v = given.get("k"), given.get("v")
    if "latent" in given:
        k = v = jnp.concatenate([given["latent"], given["k_rope"]], axis=-1)
        read = {"kv_b": given["kv_b"]}
    inputs = given["q"], k, v
    if (
        "embedding" in row.file
        or "bidirectional" in row.file
        or row.file == "modernbert"
    ):
        with pytest.raises(ValueError, match="not causal"):
            decoded(row.spec, inputs, read)
        return
    found, _ = decoded(row.spec, inputs, read, sm_scale=options["scale"])
    assert_agrees(found, arrays["out"], f"{row.file} {row.case}")


INDEXED = [
    ("deepseek_v32", "layer1"), ("glm_moe_dsa", "full"), ("hy_v4", "full"),
    ("mistral_large4", "nope"),
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize(("file", "case"), INDEXED)
def test_indexed_latents(file, case):
    arrays, options = cases(file)[case]
    score = sa.dot("iq", "ik", "iw", "relu")
    choice = sa.topk(
        options["k"], block=1, block_q=1, score=score, scope="shared",
        eligible=sa.causal(),
    )  # fmt: skip
    given = {
        "iq": arrays["idx_q"], "ik": arrays["idx_k"][:, :, None],
        "iw": arrays["idx_w"], "kv_b": arrays["kv_b"],
    }  # fmt: skip
    if "sinks" in arrays:
        given["sink"] = arrays["sinks"]
    spec = sa.latent(sa.softmax(sa.causal() & choice, sink="sink" in given))
    kv = np.concatenate([arrays["latent"], arrays["k_rope"]], axis=-1)
    given = {name: np.asarray(x) for name, x in given.items()}
    inputs = tuple(jnp.asarray(x) for x in (arrays["q"], kv, kv))
    found, _ = decoded(spec, inputs, given, sm_scale=options["scale"])
    assert_agrees(found, arrays["out"], f"{file} {case}")


@pytest.mark.sample(1)
@pytest.mark.parametrize("file", ["qwen3_next", "kimi_linear", "bailing_hybrid"])
def test_recurrences(file):
    arrays, options = cases(file)["delta"]
    by = "channel" if arrays["g"].ndim == 4 else "head"
    spec = sa.delta("beta", "g", by=by, normalise_keys=bool(options.get("l2norm")))
    q, k, v = (jnp.asarray(arrays[name]) for name in "qkv")
    given = {name: np.asarray(arrays[name]) for name in ("g", "beta")}
    found, cache = decoded(spec, (q, k, v), given, sm_scale=options["scale"])
    assert_agrees(found, arrays["out"], file)
    assert_agrees(cache.states.s, arrays["final_state"], f"{file}: state")
