"""recurrentgemma (Griffin in Flax's Linen): its local attention on ``attention_fn``.

    python tests/clients/recurrentgemma_client.py [--gains]

One statement replaces the seven of ``LocalAttentionBlock`` that compute logits, mask,
softmax and products. Without a cache the spec says the window and the documents, so the
mask is not read. With a cache, which is a ring, the mask says the pairs.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from harness import check_equal, edited, gains, step_of
from recurrentgemma import common
from recurrentgemma.jax import griffin, modules

from sadsl.layers import attention_fn


def local(block, segment_pos, cache):
    """The attention function of a call of a ``LocalAttentionBlock``."""
    if cache is not None:
        return masked
    spec = f"causal() & window({block.window_size}) & segments()"
    ids = jnp.cumsum(segment_pos == 0, axis=-1)
    return attention_fn(spec, mask="implied", kv_segment_ids=ids)


def masked(q, k, v, mask):
    """Attends to the pairs of a mask ``[batch, queries, keys]``."""
    return attention_fn("full()")(q, k, v, mask=mask[:, None])


PLAIN = modules.LocalAttentionBlock
SWAPPED = edited(
    PLAIN, "# Compute attention.", "encoded = einops.rearrange(",
    "encoded = local(self, segment_pos, cache)(queries, keys, values, mask=attn_mask)",
    local=local,
)  # fmt: skip


def swapped():
    """The client's models use the swapped block within this context."""
    return mock.patch.object(modules, "LocalAttentionBlock", SWAPPED)


def config(window):
    """A small Griffin: a recurrent block, then local attention of 4 heads."""
    kinds = common.TemporalBlockType
    return common.GriffinConfig(
        vocab_size=64, width=32, mlp_expanded_width=48, num_heads=4, lru_width=32,
        block_types=(kinds.RECURRENT, kinds.ATTENTION), logits_soft_cap=30.0,
        embeddings_scale_by_sqrt_dim=True, attention_window_size=window,
        scan_type=common.ScanType.ASSOCIATIVE_NATIVE,
    )  # fmt: skip


def check_models():
    """A whole model: packed documents, and a prompt that is continued."""
    tokens = jax.random.randint(jax.random.key(0), (2, 37), 0, 64)
    positions = jnp.stack([jnp.arange(37), jnp.r_[jnp.arange(14), jnp.arange(23)]])
    model = griffin.Griffin(config(window=9))
    params = jax.jit(model.init)(jax.random.key(1), tokens, positions)

    def results():
        def forward(params, tokens, positions):
            return model.apply(params, tokens, positions)[0]

        prompt = model.apply(params, tokens[:, :20], positions[:1, :20].repeat(2, 0))
        one = jax.jit(lambda x, at, cache: model.apply(params, x, at, cache))
        rows, cache = [prompt[0]], prompt[1]
        for i in range(20, 37):
            out, cache = one(tokens[:, i : i + 1], jnp.full((2, 1), i), cache)
            rows.append(out)
        return jax.jit(step_of(forward))(params, tokens, positions), rows

    plain, plain_rows = results()
    with swapped():
        ours, our_rows = results()
    check_equal("logits and gradients of a Griffin, packed documents", plain, ours)
    check_equal("a prompt and 17 steps on its ring cache", plain_rows, our_rows)


def step_of_length(length):
    """The step of one block of local attention, its published window of 2,048."""
    steps = []
    for cls in (PLAIN, SWAPPED):
        block = cls(width=128, num_heads=2, window_size=2048)

        def forward(params, x, at, block=block):
            return block.apply(params, x, at, None, return_cache=False)[0]

        steps.append(step_of(forward))
    x = jax.random.normal(jax.random.key(0), (1, length, 128))
    at = jnp.arange(length)[None]
    return *steps, (block.init(jax.random.key(1), x[:, :8], at[:, :8]), x, at)


def main():
    """Equal results, the client's own tests, and with ``--gains`` time and memory."""
    check_models()
    folder = Path(modules.__file__).parent
    names = "modules_test.py", "griffin_test.py", "sampler_test.py"
    with swapped():
        options = "-q", "-c", os.devnull, "-p", "no:cacheprovider"
        failed = pytest.main([*options, *(str(folder / name) for name in names)])
    assert not failed, "recurrentgemma's own tests"
    if "--gains" in sys.argv:
        what = "LocalAttentionBlock, 2 heads of 64, a window of 2,048"
        gains(what, step_of_length, (2048, 4096, 8192))


if __name__ == "__main__":
    main()
