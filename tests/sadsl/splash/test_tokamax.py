"""The interface of tokamax's splash attention against that of jax's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sadsl import splash
from sadsl.splash import tokamax

SHAPE = Q, K = 24, 31
PAIRS = np.random.default_rng(0).random(SHAPE) < 0.5
CONFIG = dataclasses.replace(
    tokamax.SplashConfig.get_default(), attn_logits_soft_cap=3.0
)


def arrays():
    draw = np.random.default_rng(1)
    shapes = (4, Q, 8), (2, K, 8), (2, K, 8)
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


def wanted(save_residuals=False):
    kernel = splash.make_splash_mha_single_device(
        np.stack([PAIRS] * 4), attn_logits_soft_cap=3.0, save_residuals=save_residuals
    )
    return kernel(*arrays())


def test_a_mask_of_all_heads_and_its_statistics():
    kernel = tokamax.make_splash_mha_single_device(
        splash.NumpyMask(PAIRS), config=CONFIG, save_residuals=True
    )
    out, stats = kernel(*arrays(), max_logit_value=jnp.full(4, 9.0))
    true, (lse,) = wanted(save_residuals=True)
    np.testing.assert_allclose(out, true, atol=2e-5)
    np.testing.assert_allclose(stats["logsumexp"], lse, atol=2e-5)


@pytest.mark.slow
def test_a_mask_of_run_time_under_vmap():
    """A mask for each batch entry, as of a sparse indexer."""

    def run(mask, q, k, v):
        kernel = tokamax.make_dynamic_splash_mha(mask=mask, config=CONFIG)
        return kernel(q, k, v, None, sinks=None, max_logit_value=None)

    twice = [jnp.stack([x, x]) for x in arrays()]
    masks = jnp.stack([jnp.asarray(PAIRS), jnp.ones(SHAPE, bool)])
    out = jax.jit(jax.vmap(run))(masks, *twice)
    np.testing.assert_allclose(out[0], wanted(), atol=2e-5)
    assert not np.allclose(out[0], out[1], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_queries_over_devices(dynamic):
    mesh = jax.make_mesh((4,), ("q",), axis_types=(AxisType.Auto,))
    if dynamic:
        kernel, specs = tokamax.make_dynamic_splash_mha(
            jnp.asarray(PAIRS), mesh=mesh, mask_spec=P("q"), config=CONFIG
        )
    else:
        kernel = tokamax.make_splash_mha(
            splash.NumpyMask(PAIRS), q_seq_shards=4, config=CONFIG
        )
        specs = kernel.manual_sharding_spec(NamedSharding(mesh, P("q")))
    rows = P(None, "q")
    run = jax.shard_map(
        lambda kernel, *x: kernel(*x), mesh=mesh, in_specs=(specs, rows, P(), P()),
        out_specs=rows, check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(run)(kernel, *arrays()), wanted(), atol=2e-5)


def test_errors():
    mask = splash.CausalMask(SHAPE)
    make = tokamax.make_splash_mha_single_device
    with pytest.raises(ValueError, match=r"must be \[q_seq, kv_seq\]"):
        make(splash.MultiHeadMask([mask]))
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.1"):
        make(mask, config=dataclasses.replace(CONFIG, dropout_rate=0.1))
    with pytest.raises(ValueError, match="give both, or neither"):
        tokamax.make_dynamic_splash_mha(jnp.asarray(PAIRS), mask_spec=P("q"))
    with pytest.raises(ValueError, match=r"shape \(3,\): give one number"):
        make(mask)(*arrays(), max_logit_value=jnp.ones(3))
    bounded = make(mask, config=dataclasses.replace(CONFIG, max_logit_const=9.0))
    with pytest.raises(ValueError, match="no max_logit_const with it"):
        bounded(*arrays(), max_logit_value=jnp.ones(1))
    mesh = jax.make_mesh((4,), ("q",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="must have one entry"):
        make(mask).manual_sharding_spec(NamedSharding(mesh, P(None, "q")))
