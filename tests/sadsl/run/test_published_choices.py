"""Choices, latents and entries against the code of published models.

Selections, outputs and gradients of ``tests/vectors`` are those of other people's code,
within 3e-6 of the greatest entry of each array. Each choice runs by lists and as bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors_of import assert_agrees, cases

import sadsl as sa
from sadsl import catalog
from sadsl.catalog import models
from sadsl.layers.indexer import causal_lists, indexer_loss
from sadsl.selections import reused

CAUSAL = sa.causal()
SCORE = sa.dot("iq", "ik", "iw", "relu")
LISTS, BITS = sa.KernelConfig(lists=True), sa.KernelConfig(lists=False)


def single(k, eligible=CAUSAL):
    return sa.topk(
        k, block=1, block_q=1, score=SCORE, scope="shared", eligible=eligible
    )


def index_of(arrays, keys="idx_k"):
    """The arrays of an indexer, as operands."""
    found = {"iq": arrays["idx_q"], "ik": arrays[keys][:, :, None]}
    return found | ({"iw": arrays["idx_w"]} if "idx_w" in arrays else {})


def chosen_of(spec, q, k, operands):
    (found,) = sa.select(spec, q, k, operands=operands).values()
    return np.asarray(found)


def listed(indices, n):
    """Indices with -1 for nothing, as bools."""
    found = np.zeros((*indices.shape[:-1], n + 1), bool)
    at = np.where(indices < 0, n, indices).astype(int)
    np.put_along_axis(found, at, True, axis=-1)
    return found[..., :n]


def assert_gradients(run, given, arrays, what):
    """Output and gradients of ``run(**given)`` agree with the arrays."""

    def total(given):
        out = run(**given)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weight), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(given)
    assert_agrees(out, arrays["out"], f"{what}: out")
    for name, gradient in gradients.items():
        if gradient.size:
            assert_agrees(gradient, arrays[f"d_{name}"], f"{what}: d_{name}")


def of_latent(spec, arrays, options, operands, config, form):
    """A call of multi-head latent attention, as a function of what has gradients."""
    term = sa.latent(spec, form=form)

    def run(q, latent, k_rope, kv_b):
        kv = jnp.concatenate([latent, k_rope], axis=-1)
        return sa.attention(
            q, kv, kv, term, operands={**operands, "kv_b": kv_b},
            sm_scale=options["scale"], config=config,
        )  # fmt: skip

    names = "q", "latent", "k_rope", "kv_b"
    return run, {name: jnp.asarray(arrays[name]) for name in names}


MLA = [
    ("deepseek_v32", "layer1"), ("glm_moe_dsa", "full"), ("hy_v4", "full"),
    ("mistral_large4", "full"), ("mistral_large4", "nope"),
]  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
@pytest.mark.parametrize(("file", "case"), MLA)
def test_indexed_latents(file, case, config, form):
    arrays, options = cases(file)[case]
    operands, n = index_of(arrays), arrays["q"].shape[1]
    spec = single(options["k"])
    q, kv = arrays["q"], np.zeros_like(arrays["q"][:, :, :1])
    found = chosen_of(spec, q, kv, operands)
    wanted = listed(arrays["topk"], n) & np.tril(np.ones((n, n), bool))
    np.testing.assert_array_equal(found & np.tril(np.ones((n, n), bool)), wanted)
    sink = {"sink": jnp.asarray(arrays["sinks"])} if "sinks" in arrays else {}
    term = sa.softmax(CAUSAL & spec, sink=bool(sink))
    run, given = of_latent(term, arrays, options, operands | sink, config, form)
    assert_gradients(run, given, arrays, f"{file} {case}")


@pytest.mark.slow
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
@pytest.mark.parametrize(
    ("file", "case", "source"),
    [("glm_moe_dsa", "shared", "full"), ("hy_v4", "shared", "full1"),
     ("mistral_large4", "shared_choice_and_latent", "full")],
)  # fmt: skip
def test_shared_choices(file, case, source, config):
    arrays, options = cases(file)[case]
    made_by = cases(file)[source][0]
    choice = single(options["k"])
    q = made_by["q"]
    made = sa.select(CAUSAL & choice, q, q[:, :, :1], operands=index_of(made_by))
    sink = {"sink": jnp.asarray(arrays["sinks"])} if "sinks" in arrays else {}
    term = sa.softmax(CAUSAL & reused(choice), sink=bool(sink))
    run, given = of_latent(term, arrays, options, {**made, **sink}, config, None)
    assert_gradients(run, given, arrays, f"{file} {case}")


@pytest.mark.slow
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
def test_pools_of_keys(config):
    """GLM-5.3: whole pools by their pooled index keys, and the unfinished pool."""
    arrays, options = cases("glm5_next_kpool")["layer1"]
    pool, n = options["pool"], arrays["q"].shape[1]
    keys = sa.entries(
        jnp.asarray(arrays["idx_k"]), jnp.asarray(arrays["pool_gate"]), length=pool,
        position_bias=jnp.asarray(arrays["pool_bias"]),
    )  # fmt: skip
    assert_agrees(keys, arrays["pool_keys"], "pooled index keys")
    whole = sa.where(lambda q, k: k // pool * pool + pool <= q + 1)
    choice = sa.topk(
        options["k"] // pool, block=pool, block_q=1, score=SCORE, scope="shared",
        eligible=whole,
    )  # fmt: skip
    rest = sa.where(lambda q, k: k >= (q + 1) // pool * pool)
    after = -(-n // pool) - keys.shape[1]
    operands = index_of(
        {**arrays, "idx_k": jnp.pad(keys, ((0, 0), (0, after), (0, 0)))}
    )
    run, given = of_latent(
        CAUSAL & (rest | choice), arrays, options, operands, config, None
    )
    assert_gradients(run, given, arrays, "glm5_next")


@pytest.mark.sample(1)
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
@pytest.mark.parametrize("model", ["m3", "qsa", "dsa"])
def test_grouped_choices(model, config):
    """MiniMax-M3's blocks by their greatest pair, Qwen4's blocks, grouped DSA."""
    file = {"m3": "minimax_m3", "qsa": "qwen4_exp_qsa", "dsa": "fla_dsa"}[model]
    case = {"m3": "sparse", "qsa": "layer1", "dsa": "grouped"}[model]
    arrays, options = cases(file)[case]
    if model == "m3":
        block = options["block"]
        choice = sa.topk(
            options["k"], block=block, block_q=1, score=sa.dot("iq", "ik"),
            scope="group", eligible=CAUSAL, forced=sa.blocks(block),
        )  # fmt: skip
        spec, operands = CAUSAL & choice, index_of(arrays)
    elif model == "qsa":
        ratio = options["ratio"]
        whole = sa.where(lambda q, k: k // ratio * ratio + ratio <= q + 1)
        rest = sa.where(lambda q, k: k >= (q + 1) // ratio * ratio)
        choice = sa.topk(
            options["budget"] // ratio, block=ratio, block_q=1,
            score=sa.dot("iq", "ik", act="relu"), scope="shared", eligible=whole,
        )  # fmt: skip
        keys = arrays["idx_block_k"]
        after = -(-arrays["q"].shape[1] // ratio) - keys.shape[1]
        keys = np.pad(keys, ((0, 0), (0, after), (0, 0)))
        spec = CAUSAL & (rest | choice)
        operands = index_of({**arrays, "idx_block_k": keys}, "idx_block_k")
    else:
        spec, operands = CAUSAL & single(options["k"]), index_of(arrays)

    def run(q, k, v):
        return sa.attention(
            q, k, v, spec, operands=operands, sm_scale=options["scale"], config=config
        )

    given = {name: jnp.asarray(arrays[name]) for name in "qkv"}
    assert_gradients(run, given, arrays, file)


@pytest.mark.sample(1)
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
@pytest.mark.parametrize("case", ["sliding", "csa", "hca"])
def test_entries_beside_a_window(case, config):
    """DeepSeek-V4: one softmax over a window of tokens and compressed entries."""
    arrays, options = cases("deepseek_v4")[case]
    raw, ratio = options["raw"], options["ratio"]
    near = sa.softmax(CAUSAL & sa.window(11), sink=True)
    operands, spec = {}, near
    if ratio:
        whole = sa.where(lambda q, k: k < (q + 1) // ratio)
        seen = whole & single(options["k"], whole) if case == "csa" else whole
        spec = sa.joint(near, sa.over("entries", seen))
        if case == "csa":
            operands = index_of(arrays, "idx_entries")

    def run(q, kv, sinks):
        own = {"entries": kv[:, raw:]} if ratio else {}
        tokens = kv[:, :raw]
        return sa.attention(
            q, tokens, tokens, spec, operands={**operands, **own, "sink": sinks},
            sm_scale=options["scale"], config=config,
        )  # fmt: skip

    given = {name: jnp.asarray(arrays[name]) for name in ("q", "kv", "sinks")}
    assert_gradients(run, given, arrays, case)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
@pytest.mark.parametrize("case", ["csa", "hca"])
def test_deepseek_v4_at_published_rates(case, config):
    """The layers of the catalogue, at windows of 128 and entries of 4 and 128."""
    arrays, options = cases("deepseek_v4_published_rates")[case]
    raw, ratio = options["raw"], options["ratio"]
    (spec,) = models.deepseek_v4((ratio,), k=16)
    tokens, entries = spec.terms
    seen = arrays["mask"][0, 0]
    np.testing.assert_array_equal(tokens.map.dense(raw)[0], seen[:, :raw])
    operands = {}
    if case == "csa":
        # The vector has no scores: these put the entries that it chose first.
        wanted = seen[:, raw:]
        scores = {"iq": wanted[:, None], "ik": np.eye(wanted.shape[1])[:, None]}
        operands = {n: x.astype(np.float32) for n, x in scores.items()}
        operands["iw"] = np.ones((raw, 1), np.float32)
        whole = (np.arange(raw) + 1) // ratio
        np.testing.assert_array_equal(wanted.sum(axis=1), np.minimum(whole, 16))
        choice = {**operands, "entries": arrays["kv"][:, raw:]}
        chosen = chosen_of(spec, arrays["q"], arrays["kv"][:, :raw], choice)
        np.testing.assert_array_equal(chosen.reshape(wanted.shape), wanted)
    else:
        found = entries.map.dense(raw, seen.shape[1] - raw)[0]
        np.testing.assert_array_equal(found, seen[:, raw:])

    def run(q, kv, sinks):
        own = {"entries": kv[:, raw:], "sink": sinks}
        tokens = kv[:, :raw]
        return sa.attention(
            q, tokens, tokens, spec, operands={**operands, **own},
            sm_scale=options["scale"], config=config,
        )  # fmt: skip

    given = {name: jnp.asarray(arrays[name]) for name in ("q", "kv", "sinks")}
    assert_gradients(run, given, arrays, case)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LISTS, BITS], ids=["lists", "bits"])
def test_selected_blocks_of_native_sparse_attention(config):
    """Blocks by the attention of a group to their mean keys; three are forced."""
    arrays, options = cases("fla_nsa")["selected"]
    spec = catalog.nsa_topk(options["count"], block=options["block"])
    blocks = -(-arrays["q"].shape[1] // options["block"])
    found = sa.select(spec, arrays["q"], arrays["k"], sm_scale=options["scale"])
    (found,) = found.values()
    wanted = listed(np.moveaxis(arrays["chosen"], 2, 1), blocks)
    for head in range(arrays["q"].shape[2]):
        np.testing.assert_array_equal(found[:, head], wanted[:, 0])

    def run(q, k, v):
        return sa.attention(q, k, v, spec, sm_scale=options["scale"], config=config)

    given = {name: jnp.asarray(arrays[name]) for name in "qkv"}
    assert_gradients(run, given, arrays, "selected")


def test_compressed_branch_of_native_sparse_attention():
    arrays, options = cases("fla_nsa")["compressed"]
    block = options["block"]
    spec = catalog.native_sparse_attention(
        4, block=block, length=block, stride=block, own_keys=True
    )

    def run(q, k_cmp, v_cmp, lse=False):
        own = {"short_k": k_cmp, "short_v": v_cmp}
        unread = jnp.zeros_like(q[:, :, :1])
        return sa.attention(
            q, unread, unread, spec.terms[0], operands=own, sm_scale=options["scale"],
            return_lse=lse,
        )  # fmt: skip

    given = {name: jnp.asarray(arrays[name]) for name in ("q", "k_cmp", "v_cmp")}
    assert_gradients(run, given, arrays, "compressed")
    lse = np.moveaxis(run(**given, lse=True)[1], 1, 2)
    none = arrays["lse"] < -1e29
    assert none.any()
    assert np.isneginf(lse[none]).all()
    assert_agrees(lse[~none], arrays["lse"][~none], "lse")


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["csa", "hca", "csa_index_keys"])
def test_entries_are_those_of_deepseek_v4(case):
    """Pooling, RMS norm, and rotation of the last channels."""
    arrays, options = cases("deepseek_v4_compress")[case]
    rest = {n: jnp.asarray(arrays[n]) for n in ("norm", "cos", "sin")}

    def run(kv, gate, position_bias, norm):
        x = sa.entries(
            kv, gate, length=options["ratio"], position_bias=position_bias,
            overlap=options["overlap"],
        )  # fmt: skip
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(square + options["eps"]) * norm[None, None]
        turned = 2 * rest["cos"].shape[-1]
        first, second = x[..., -turned::2], x[..., x.shape[-1] - turned + 1 :: 2]
        cos, sin = rest["cos"][None], rest["sin"][None]
        pair = first * cos - second * sin, second * cos + first * sin
        pair = jnp.stack(pair, axis=-1).reshape(*x.shape[:-1], turned)
        return jnp.concatenate([x[..., :-turned], pair], axis=-1)

    names = "kv", "gate", "position_bias", "norm"
    given = {name: jnp.asarray(arrays[name]) for name in names}
    assert_gradients(run, given, arrays, case)


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["dense_warm_up", "sparse_training"])
def test_loss_of_an_indexer(case):
    arrays, options = cases("dsa_indexer_loss")[case]
    q, k = jnp.asarray(arrays["q"]), jnp.asarray(arrays["k"])
    n, scale = q.shape[1], options["scale"]
    score = sa.dot("iq", "ik", "iw", "relu", options["idx_scale"])
    choice = sa.topk(
        options["k"], block=1, block_q=1, score=score, scope="shared", eligible=CAUSAL
    )
    operands = {name: jnp.asarray(x) for name, x in index_of(arrays).items()}
    spec, listed_keys = CAUSAL, causal_lists(n)
    if options["sparse"]:
        spec = CAUSAL & choice
        made = sa.select(spec, q, k, operands=operands, lists=True)
        (listed_keys,) = made.values()
    read = operands if options["sparse"] else {}
    _, lse = sa.attention(
        q, k, k, spec, operands=read, sm_scale=scale, return_lse=True, config=BITS
    )

    def loss(operands):
        return indexer_loss(score, operands, q, k, lse, listed_keys, sm_scale=scale)

    found, gradients = jax.jit(jax.value_and_grad(loss))(operands)
    assert_agrees(found, arrays["loss"].reshape(()), "loss")
    assert_agrees(gradients["iq"], arrays["d_idx_q"], "d_idx_q")
    assert_agrees(gradients["ik"][:, :, 0], arrays["d_idx_k"], "d_idx_k")
    assert_agrees(gradients["iw"], arrays["d_idx_w"], "d_idx_w")
