"""Flax's example gemma (nnx), from its own source distribution, on ``attention_fn``.

    python tests/clients/flax_gemma_client.py [--gains]

The example computes attention itself: one statement replaces the lines from logits to
output.
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
EXAMPLE = source(Path(FOLDER.name)) / "examples" / "gemma"
sys.path.append(str(EXAMPLE))

import modules as gemma  # noqa: E402
import transformer  # noqa: E402

ATTENTION = gemma.Attention
# The example's tests that cannot pass, and why.
LEFT_OUT = {
    "test_sow_intermediates3": "stores logits, which no kernel keeps",
    "test_transformer2": "has dropout in a step with a cache, whose position is traced",
}


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
    skipped = " or ".join(LEFT_OUT)
    with mock.patch.object(gemma, "Attention", GEMMA):
        paths = (str(EXAMPLE / name) for name in names)
        options = "-q", "-c", os.devnull, "-p", "no:cacheprovider"
        failed = pytest.main([*options, "-k", f"not ({skipped})", *paths])
    assert not failed, "the example's own tests"
    for name, why in LEFT_OUT.items():
        print(f"left out {name}: {why}")


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
    check_gemma()
    run_tests()
    if "--gains" in sys.argv:
        gains("Gemma's layer, 4 heads of 64, a window of 512", step_of_length)
