"""Flax's examples lm1b (Linen) and gemma (nnx), from its own source distribution.

    python tests/clients/flax_examples_client.py [--gains]

lm1b gets one argument more, where it makes ``MultiHeadDotProductAttention``. In gemma,
which computes attention itself, one statement replaces the lines from logits to output.
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax_suite import source
from harness import check_equal, drawn, edited, furthest, gains, step_of

import sadsl as sa
from sadsl.layers import attention_fn

FOLDER = tempfile.TemporaryDirectory()
EXAMPLES = source(Path(FOLDER.name)) / "examples"
sys.path += [str(EXAMPLES / "lm1b"), str(EXAMPLES / "gemma")]

import models as lm1b  # noqa: E402
import modules as gemma  # noqa: E402
import transformer  # noqa: E402

LM_BLOCK, ATTENTION = lm1b.EncoderDecoder1DBlock, gemma.Attention
# The client's tests that cannot pass, and why.
EXPECTED = {"test_sow_intermediates3": "stores logits, which no kernel keeps"}


def lm_block(**options):
    """The block of lm1b with an attention function."""
    return edited(
        LM_BLOCK, "decode=config.decode,", ")(x, mask=decoder_mask)",
        "decode=config.decode, attention_fn=ours,", ours=attention_fn(**options),
    )  # fmt: skip


def attended(layer, mask, rngs):
    """The attention function of a call of gemma's layer, and what it passes."""
    pairs = sa.causal()
    if layer.attn_type == gemma.AttentionType.LOCAL_SLIDING:
        pairs &= sa.window(layer.sliding_window_size - 1)
    spec = sa.softmax(pairs, logits_soft_cap=layer.attn_logits_soft_cap)
    rate = 0.0 if layer.dropout.deterministic else layer.dropout.rate
    given = {"mask": mask[:, None].astype(bool), "dropout_rate": rate}
    given["dropout_rng"] = rngs.dropout() if rate else None
    return attention_fn(spec, mask="padding", sm_scale=1.0), given


GEMMA = edited(
    ATTENTION, "use_gqa = self.num_heads", "attn_output = self.attn_vec_einsum(",
    "ours, given = attended(self, attn_mask, rngs); "
    "encoded = ours(query_scaled, key_proj, value_proj, **given)", attended=attended,
)  # fmt: skip


def check_lm1b():
    """Logits and gradients of packed and padded text, and Flax's own decoding."""
    tokens = jax.random.randint(jax.random.key(0), (2, 37), 1, 64)
    packed = jnp.array([[1] * 20 + [2] * 17, [1] * 30 + [0] * 7])
    tokens = jnp.where(packed > 0, tokens, 0)
    size = {"emb_dim": 32, "qkv_dim": 32, "mlp_dim": 48, "num_layers": 2}
    config = lm1b.TransformerConfig(64, 64, deterministic=True, **size)

    def results():
        def forward(params, ids):
            out = model.apply(params, tokens, inputs_segmentation=ids)
            return jnp.where((tokens > 0)[..., None], out, 0)

        model, steps = (
            lm1b.TransformerLM(config.replace(decode=x)) for x in (False, True)
        )
        params = model.init(jax.random.key(1), tokens)
        cache = steps.init(jax.random.key(1), tokens)["cache"]
        one = jax.jit(
            lambda x, c: steps.apply({**params, "cache": c}, x, mutable=["cache"])
        )
        rows = []
        for i in range(37):
            row, cache = one(tokens[:1].repeat(2, 0)[:, i : i + 1], cache)
            rows, cache = [*rows, row], cache["cache"]
        step = jax.jit(step_of(forward))
        return [step(params, None), step(params, packed), rows]

    plain = results()
    for what, options in (("padding", {"mask": "padding"}), ("any mask", {})):
        block = lm_block(spec="causal()", **options)
        with mock.patch.object(lm1b, "EncoderDecoder1DBlock", block):
            ours = results()
        check_equal(f"lm1b, {what}: logits and gradients", plain[0], ours[0])
        if not options:
            check_equal("lm1b: packed documents", plain[1], ours[1])
        check_equal("lm1b: decode=True, 37 steps", plain[2], ours[2])


def small_gemma(window=8):
    """Gemma with a sliding and a global layer; its graph and its weights."""
    config = transformer.TransformerConfig(
        num_layers=2, num_embed=64, embed_dim=32, hidden_dim=48, num_heads=4,
        head_dim=8, num_kv_heads=2, final_logit_softcap=None, attn_logits_soft_cap=20.0,
        use_post_attn_norm=True, use_post_ffw_norm=True, sliding_window_size=window,
        attention_types=[gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL],
    )  # fmt: skip
    graph, params, rest = nnx.split(
        transformer.Transformer(config, rngs=nnx.Rngs(0)), nnx.Param, ...
    )
    return graph, drawn(params), rest


def check_gemma():
    """Logits and gradients with padding, and steps with its cache of 24 slots."""
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 1, 64)
    at = jnp.broadcast_to(jnp.arange(24), (2, 24))
    mask = transformer.make_causal_attn_mask(at < jnp.array([[24], [17]]))

    def results():
        graph, params, rest = small_gemma()

        def forward(params):
            return nnx.merge(graph, params, rest)(tokens, at, None, mask)[0]

        model = nnx.merge(graph, params, rest)
        cache, rows = model.init_cache(24, 2, jnp.float32), []
        one = jax.jit(lambda *xs: nnx.merge(graph, params, rest)(*xs))
        for i in range(24):
            now = slice(i, i + 1)
            seen = jnp.broadcast_to(jnp.arange(24) <= i, (2, 1, 24))
            row, cache = one(tokens[:, now], at[:, now], cache, seen)
            rows.append(row[0])
        return jax.jit(step_of(forward))(params), jnp.concatenate(rows)

    plain, plain_rows = results()
    with mock.patch.object(gemma, "Attention", GEMMA):
        ours, rows = results()
    check_equal("gemma, padding: logits and gradients", plain, ours)
    check_equal("gemma: its cache within a window", plain_rows[:8], rows[:8])
    check_equal("gemma: its cache and the full pass, ours", ours[0][0], rows)
    apart = furthest(plain[0][0], plain_rows)
    print(f"differs gemma: its cache and the full pass, Flax's ({apart:.1f} apart)")


def run_tests():
    """Gemma's own tests of its modules and its transformer."""
    names = "modules_test.py", "transformer_test.py"
    skipped = " or ".join(EXPECTED)
    with mock.patch.object(gemma, "Attention", GEMMA):
        paths = (str(EXAMPLES / "gemma" / name) for name in names)
        options = "-q", "-c", os.devnull, "-p", "no:cacheprovider"
        failed = pytest.main([*options, "-k", f"not ({skipped})", *paths])
    assert not failed, "the example's own tests"


def step_of_length(length):
    """A gemma layer of 4 heads of 64 on 2, a window of 512."""
    steps = []
    for cls in (ATTENTION, GEMMA):
        layer = cls(
            4, 2, 256, 64, 0.125, gemma.AttentionType.LOCAL_SLIDING, rngs=nnx.Rngs(0),
            sliding_window_size=512, shd_config=gemma.ShardingConfig.no_sharding(),
        )  # fmt: skip
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def forward(params, x, at, graph=graph, rest=rest):
            mask = transformer.make_causal_attn_mask(at >= 0)
            return nnx.merge(graph, params, rest)(x, at, None, mask)[1]

        steps.append(step_of(forward))
    x = jax.random.normal(jax.random.key(0), (1, length, 256))
    return *steps, (params, x, jnp.arange(length)[None])


if __name__ == "__main__":
    check_lm1b()
    check_gemma()
    run_tests()
    if "--gains" in sys.argv:
        gains("Gemma's layer, 4 heads of 64, a window of 512", step_of_length)
