"""``dot`` against its definition in float64, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.selections import reused

CAUSAL = sa.causal()


def arrays(n, heads=4, dim=5, key_heads=1, seed=0):
    rng = np.random.default_rng(seed)
    shape = 2, n, heads
    return {
        "iq": rng.normal(size=(*shape, dim)).astype(np.float32),
        "ik": rng.normal(size=(2, n, key_heads, dim)).astype(np.float32),
        "iw": rng.normal(size=shape).astype(np.float32),
    }


def scores_of(given, choices, act):
    """[batch, choices, q, k] in float64."""
    iq, ik, iw = (given[name].astype(np.float64) for name in ("iq", "ik", "iw"))
    ik = np.repeat(ik, iq.shape[2] // ik.shape[2], axis=2)
    each = np.einsum("bqhd,bkhd->bhqk", iq, ik)
    each = np.maximum(each, 0) if act else each
    each = each * np.swapaxes(iw, 1, 2)[..., None]
    return each.reshape(len(iq), choices, -1, *each.shape[2:]).sum(2)


def best(scores, k, allowed, block):
    cells = -(-scores.shape[-1] // block)
    masked = np.where(allowed, scores, -np.inf)
    masked = np.pad(masked, [(0, 0)] * 3 + [(0, cells * block - masked.shape[-1])],
                    constant_values=-np.inf)  # fmt: skip
    masked = masked.reshape(*masked.shape[:3], cells, block).max(-1)
    order = np.argsort(-masked, axis=-1, kind="stable")[..., :k]
    found = np.zeros(masked.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found & (masked > -np.inf)


@pytest.mark.sample(1)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("scope", ["shared", "group", "query"])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("n", [13, 37])
def test_choices_are_those_of_the_definition(n, key_heads, scope, block):
    given = arrays(n, key_heads=key_heads)
    act = "relu" if n == 37 else None
    top = sa.topk(3, block=block, block_q=1, scope=scope, eligible=CAUSAL,
                  score=sa.dot("iq", "ik", "iw", act))  # fmt: skip
    q, k = jnp.zeros((2, n, 4, 3)), jnp.zeros((2, n, 2, 3))
    (found,) = sa.select(CAUSAL & top, q, k, operands=given).values()
    choices = {"shared": 1, "group": 2, "query": 4}[scope]
    allowed = np.tril(np.ones((n, n), bool))
    wanted = best(scores_of(given, choices, act), 3, allowed, block)
    if scope == "shared":
        wanted = wanted[:, 0]
    else:
        wanted = np.repeat(wanted, 4 // choices, axis=1)
    np.testing.assert_array_equal(found, wanted)


def call(given, config=None, n=9, **options):
    options = {"eligible": CAUSAL, "block": 1, "block_q": 1, "scope": "shared",
               "score": sa.dot("iq", "ik", "iw", "relu"), **options}  # fmt: skip
    x = jnp.ones((2, n, 4, 3))
    spec = CAUSAL & sa.topk(2, **options)
    return sa.attention(x, x, x, spec, operands=given, config=config)


def test_scores_that_are_not_finite_count_as_the_least():
    """With lists and as bits: a NaN score is chosen only where nothing else is left."""
    given = arrays(9)
    given["ik"][:, 3] = np.nan
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 4, 3)), jnp.float32)
    spec = CAUSAL & sa.topk(2, block=1, block_q=1, scope="shared", eligible=CAUSAL,
                            score=sa.dot("iq", "ik", "iw", "relu"))  # fmt: skip
    (bits,) = sa.select(spec, x, x, operands=given).values()
    assert not np.asarray(bits)[:, 4:, 3].any()
    outs = [
        sa.attention(x, x, x, spec, operands=given, config=sa.KernelConfig(lists=lists))
        for lists in (True, False)
    ]
    np.testing.assert_allclose(*outs, atol=2e-6)


def test_bad_arrays_are_refused():
    given = arrays(9)
    for change, message in (
        ({"iq": given["iq"][:, :5]}, "'iq' has shape"),
        ({"ik": given["ik"][..., :2]}, "'ik' has shape"),
        ({"ik": np.repeat(given["ik"], 3, axis=2)}, "'ik' has 3 heads"),
        ({"iw": given["iw"][..., :1]}, "'iw' has shape"),
        ({"iq": given["iq"].astype(np.int32)}, "of floats"),
    ):
        with pytest.raises(ValueError, match=message):
            call({**given, **change})
    with pytest.raises(ValueError, match="'iw', the weights of index heads"):
        call({n: x for n, x in given.items() if n != "iw"})
    with pytest.raises(ValueError, match="multiple of the 4 choices"):
        call({**arrays(9, heads=2)}, scope="query")
    with pytest.raises(ValueError, match="act='gelu'"):
        sa.dot(act="gelu")


def test_bad_lists_are_refused():
    x = jnp.ones((1, 6, 2, 3))
    top = sa.topk(2, block=1, block_q=1, scope="shared", eligible=CAUSAL)
    key = top.key("listed")
    good = np.array([[0, 6], [0, 1], [1, 2], [0, 3], [3, 4], [0, 5]])[None]
    sa.attention(x, x, x, CAUSAL & top, operands={key: good})
    for listed, message in (
        (np.where(good == 3, 0, good), "ascending without repeats"),
        (np.where(good == 3, 7, good), "from 0 to 5"),
        (np.where(good == 3, -1, good), "from 0 to 5"),
        (good[:, :4], "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            sa.attention(x, x, x, CAUSAL & top, operands={key: listed})
    with pytest.raises(ValueError, match="takes the choice of an earlier layer"):
        sa.attention(x, x, x, CAUSAL & reused(top))
    head = sa.topk(2, block=1, scope="head")
    with pytest.raises(ValueError, match="cannot hold the choice"):
        sa.attention(x, x, x, head, operands={head.key("listed"): good})
