"""Flax's example lm1b (Linen), from its own source distribution, on ``attention_fn``.

    python tests/clients/flax_lm1b_client.py

Where it makes ``MultiHeadDotProductAttention``, lm1b gets one argument more.
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from flax_suite import source
from harness import check_equal, edited, step_of

from sadsl.layers import attention_fn

FOLDER = tempfile.TemporaryDirectory()
sys.path.append(str(source(Path(FOLDER.name)) / "examples" / "lm1b"))

import models as lm1b  # noqa: E402

LM_BLOCK = lm1b.EncoderDecoder1DBlock


def lm_block(**options):
    """The block of lm1b with an attention function."""
    return edited(
        LM_BLOCK, "decode=config.decode,", ")(x, mask=decoder_mask)",
        "decode=config.decode, attention_fn=ours,", ours=attention_fn(**options),
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


if __name__ == "__main__":
    check_lm1b()
