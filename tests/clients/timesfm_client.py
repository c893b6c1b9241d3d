"""timesfm (Flax's nnx): its transformer layers on ``attention_fn``.

    python tests/clients/timesfm_client.py [--gains]

``MultiHeadAttention`` of timesfm has the argument ``attention_fn``, and Flax's dense
function is its default. Its mask is causal, hides padding on the left, and with a cache
counts queries from the next slot; a step has four queries.
"""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from harness import check_equal, drawn, gains, step_of
from timesfm.flax import transformer, util

from sadsl.layers import attention_fn

PADDING = attention_fn("causal()", mask="padding")
ANY = attention_fn("full()")
CACHED = attention_fn("causal()", mask="cache")


def layer(ours=None, width=32, heads=4):
    """A layer of timesfm, split into its graph and its weights."""
    config = SimpleNamespace(
        model_dims=width, hidden_dims=2 * width, num_heads=heads, qk_norm="rms",
        attention_norm="rms", feedforward_norm="rms", use_bias=False,
        use_rotary_position_embeddings=True, ff_activation="swish",
    )  # fmt: skip
    made = transformer.Transformer(config, rngs=nnx.Rngs(0))
    if ours is not None:
        made.attn.attention_fn = ours  # the one line
    graph, params = nnx.split(made)
    return graph, drawn(params)


def forward_of(graph, pad):
    """The layer, and 0 at padding, where Flax attends to the mean of the values."""

    def forward(params, x):
        out, _ = nnx.merge(graph, params)(x, pad)
        return jnp.where(pad[..., None], 0, out)

    return forward


def forecast(graph, params, x, pad):
    """A prompt of 16 patches, then 5 steps of 4."""
    zero = jnp.zeros(2, jnp.int32)
    empty = jnp.zeros((2, 36, 4, 8))
    cache = util.DecodeCache(zero, zero, empty, empty)
    run = jax.jit(lambda x, pad, cache: nnx.merge(graph, params)(x, pad, cache))
    rows = []
    for start, stop in [(0, 16), *((i, i + 4) for i in range(16, 36, 4))]:
        out, cache = run(x[:, start:stop], pad[:, start:stop], cache)
        rows.append(jnp.where(pad[:, start:stop, None], 0, out))
    return rows


def check_layer():
    """One layer with padding on the left: gradients, and steps with a cache."""
    x = jax.random.normal(jax.random.key(0), (2, 36, 32))
    pad = jnp.arange(36)[None] < jnp.array([[0], [5]])
    graph, params = layer()
    for what, ours in (("padding", PADDING), ("any mask", ANY)):
        steps = (forward_of(g, pad) for g in (graph, layer(ours)[0]))
        plain, ours = (jax.jit(step_of(f))(params, x) for f in steps)
        check_equal(f"output and gradients of a layer, {what}", plain, ours)
    rows = [forecast(g, params, x, pad) for g in (graph, layer(CACHED)[0])]
    check_equal("a prompt, and steps of 4 patches with its cache", *rows)


def step_of_length(length):
    """A layer of 4 heads of 64, where a quarter of the context is padding."""
    pad = (jnp.arange(length) < length // 4)[None]
    steps = [step_of(forward_of(layer(f, 256)[0], pad)) for f in (None, PADDING)]
    x = jax.random.normal(jax.random.key(0), (1, length, 256))
    return *steps, (layer(None, 256)[1], x)


def main():
    """Equal results, and with ``--gains`` time and memory."""
    check_layer()
    if "--gains" in sys.argv:
        gains("Transformer layer, 4 heads of 64, a quarter padding", step_of_length)


if __name__ == "__main__":
    main()
