"""Tunix' models: their Splash import swapped for ``sadsl.splash``, off TPU.

    python tests/clients/tunix_client.py [--gains]

Two imports of a model file name ``sadsl.splash`` instead of jax's modules. Jax's Splash
runs on TPU only, so everywhere else the models take their dense path: it is the oracle
here. The models run in ``shard_map`` on a mesh of four CPU devices.
"""

import dataclasses
import importlib.util
import os
import sys
import types

# Before jax starts.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"


def without_init(*names: str) -> None:
    """Makes packages importable whose ``__init__`` imports what a model does not need.

    That of Tunix imports data sets, transformers and TensorFlow.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package


without_init("tunix", "tunix.models", "tunix.models.qwen3", "tunix.models.gemma4")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from harness import check_equal, drawn, gains, step_of  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from tunix.models.gemma4 import model as gemma4  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402

from sadsl.splash import kernel as splash  # noqa: E402
from sadsl.splash import masks as mask_lib  # noqa: E402

for module in (gemma4, qwen3):  # the two lines of their imports
    module.splash, module.mask_lib = splash, mask_lib


def qwen(**options):
    """A small Qwen 3: 4 heads on 2 of keys and values."""
    config = qwen3.ModelConfig(
        num_layers=1, vocab_size=64, embed_dim=32, hidden_dim=48, num_heads=4,
        head_dim=8, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-6,
        use_tied_embedding=True, **options,
    )  # fmt: skip
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def gemma(**options):
    """A small Gemma 4: a layer of a window of 10 tokens, then a global one."""
    kinds = gemma4.AttentionType
    config = gemma4.ModelConfig(
        num_layers=2, num_embed=64, embed_dim=32, hidden_dim=48, num_heads=4,
        head_dim=8, num_kv_heads=2, global_key_size=16, sliding_window_size=10,
        attention_pattern=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        use_sliding_window_kv_cache=False, **options,
    )  # fmt: skip
    return gemma4.Gemma4(config, rngs=nnx.Rngs(0))


def split(model):
    """Its graph, weights drawn at random, and the rest."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return graph, drawn(params), rest


def check_model(what, make, length, ids=None):
    """Logits and gradients of the Splash path against the dense path."""
    tokens = jax.random.randint(jax.random.key(0), (4, length), 0, 64)
    at = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.broadcast_to(at[:, :, None] >= at[:, None], (4, length, length))
    if ids is not None:
        mask &= ids[:, :, None] == ids[:, None]
    found = []
    for flash in (False, True):
        graph, params, rest = split(make(use_flash_attention=flash))
        extra = {"segment_ids": ids} if ids is not None else {}

        def forward(params, graph=graph, rest=rest, extra=extra):
            model = nnx.merge(graph, params, rest)
            return model(tokens, at, None, mask, **extra)[0]

        found.append(jax.jit(step_of(forward))(params))
    check_equal(what, *found)


def step_of_length(length):
    """One attention layer of a Gemma 4: 4 heads of 64 on 2, a window of 512."""
    steps = []
    for flash in (False, True):
        model = gemma(use_flash_attention=flash)
        config = dataclasses.replace(
            model.config, embed_dim=256, head_dim=64, sliding_window_size=512
        )
        kind = gemma4.AttentionType.LOCAL_SLIDING
        layer = gemma4.Attention(config, kind, rngs=nnx.Rngs(0))
        graph, params, rest = split(layer)

        def forward(params, x, at, graph=graph, rest=rest):
            mask = at[:, :, None] >= at[:, None]
            return nnx.merge(graph, params, rest)(x, at, None, mask)[1]

        steps.append(step_of(forward))
    x = jax.random.normal(jax.random.key(0), (1, length, 256))
    return *steps, (params, x, jnp.arange(length)[None])


def main():
    """Equal results, and with ``--gains`` time and memory."""
    devices = np.array(jax.devices()).reshape(2, 2)
    packed = jnp.array([[0] * 20 + [1] * 18, [0] * 38, [2] * 5 + [3] * 33, [7] * 38])
    with Mesh(devices, ("fsdp", "tp")):
        check_model("a Qwen 3 on 2 x 2 devices", qwen, 38)
        check_model("a Qwen 3, packed documents", qwen, 38, packed)
        check_model("a Gemma 4, window and global, on 2 x 2 devices", gemma, 37)
    if "--gains" in sys.argv:
        with Mesh(devices[:1, :1], ("fsdp", "tp")):
            gains("Gemma 4's layer of a window of 512, 4 heads of 64", step_of_length)


if __name__ == "__main__":
    main()
