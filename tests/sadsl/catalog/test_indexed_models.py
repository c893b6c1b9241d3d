"""Schedules of the models that choose by an indexer, and one call of each layer."""

import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.catalog import models


def reuses(layers):
    return [i for i, term in enumerate(layers) if "reused" in repr(term)]


def test_schedules():
    assert len(models.deepseek_v32()) == 61
    assert len(models.glm_5()) == 78
    assert reuses(models.glm_5()) == []
    shared = reuses(models.glm_5(every=4, offset=3))
    assert shared == [i for i in range(78) if max(i - 2, 0) % 4]
    full = [0, 1, 5, 9, 13, 17, 21, 25, 29, 33]
    assert reuses(models.hy_v4()) == [i for i in range(34) if i not in full]
    assert len(models.mistral_large_4()) == 72
    v4 = models.deepseek_v4()
    assert len(v4) == 43
    assert [i for i, x in enumerate(v4) if isinstance(x, sa.Softmax)] == [0, 1]
    assert [("topk" in repr(x)) for x in v4[2:6]] == [True, False, True, False]
    assert sum("topk" in repr(x) for x in models.minimax_m3()) == 57
    for layers, count in ((models.glm_5_next(), 45), (models.qwen4_exp(), 40)):
        assert len(layers) == count
        chosen = [i for i, x in enumerate(layers) if "topk" in repr(x)]
        assert chosen == list(range(3, count, 4))


ROWS = {
    "deepseek_v32": models.deepseek_v32(1, k=3)[0],
    "mistral_large_4": models.mistral_large_4(1, k=3)[0],
    "glm_5_next": models.glm_5_next(4, k=8, pool=4)[3],
    "minimax_m3": models.minimax_m3(4, k=2, block=4)[3],
    "qwen4_exp": models.qwen4_exp(4, k=8)[3],
    "csa": models.deepseek_v4((4,), k=2, near=5)[0],
    "hca": models.deepseek_v4((128,))[0],
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ROWS)
def test_lists_and_bits_agree(name):
    n, heads, rng = 21, 4, np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    cells = {"glm_5_next": 6, "qwen4_exp": 6, "csa": 5}.get(name, n)
    index_heads = 2 if name == "minimax_m3" else 4
    given = {
        "iq": normal(1, n, index_heads, 6), "ik": normal(1, cells, 1, 6),
        "iw": normal(1, n, 4), "kv_b": normal(heads, 9, 7), "sink": normal(heads),
        "log_scale": normal(heads), "log_bias": normal(heads),
        "entries": normal(1, 5, 1, 8),
    }  # fmt: skip
    spec = ROWS[name]
    kv_heads = 2 if name in ("minimax_m3", "qwen4_exp") else 1
    dim = 8
    if isinstance(spec, type(ROWS["deepseek_v32"])):
        q, k = normal(1, n, heads, 8), normal(1, n, 1, 7 + 3)
    else:
        q, k = normal(1, n, heads, dim), normal(1, n, kv_heads, dim)
    operands = {x: y for x, y in given.items() if spec.reads(x)}
    outs = [
        sa.attention(
            q, k, k, spec, operands=operands, config=sa.KernelConfig(lists=lists)
        )
        for lists in (True, False)
    ]
    np.testing.assert_allclose(*outs, atol=5e-6)
    assert np.isfinite(outs[0]).all()
