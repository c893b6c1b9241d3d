"""Choices by lists against the same choices as bits, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.run.lists import form_of
from sadsl.run.options import options_of
from sadsl.run.types import Setting
from sadsl.selections import tokens

LISTS, BITS = sa.KernelConfig(lists=True), sa.KernelConfig(lists=False)
CAUSAL = sa.causal()
INDEX = sa.dot("iq", "ik", "iw", "relu")


def single(k, scope="shared", **more):
    more = {"score": INDEX, "eligible": CAUSAL, **more}
    return sa.topk(k, block=1, block_q=1, scope=scope, **more)


REST = sa.where(lambda q, k: k >= (q + 1) // 4 * 4)
WHOLE = sa.where(lambda q, k: k // 4 * 4 + 4 <= q + 1)
CHUNKS = {"block": 8, "first": 3, "local": 4, "last": 2}
CASES = {
    "tokens": CAUSAL & single(5),
    "tokens of groups": CAUSAL & single(5, "group"),
    "tokens of heads": CAUSAL & single(5, "query"),
    "all that there are": CAUSAL & single(200),
    "without a causal limit": single(3, eligible=None),
    "by mean logits": CAUSAL & single(4, "query", score="mean"),
    "window beside": CAUSAL & (sa.window(6) | single(5)),
    "cells of four": CAUSAL & sa.topk(3, block=4, block_q=1, score=INDEX,
                                      scope="shared", eligible=CAUSAL),
    "own cell forced": CAUSAL & sa.topk(tokens(12), block=4, block_q=1, score=INDEX,
                                        scope="group", eligible=CAUSAL,
                                        forced=sa.blocks(4)),
    "rows of three": CAUSAL & sa.topk(3, block=4, block_q=3, score=INDEX,
                                      scope="shared", eligible=CAUSAL),
    "unfinished cell": CAUSAL & (REST | sa.topk(2, block=4, block_q=1, score=INDEX,
                                                scope="shared", eligible=WHOLE)),
    "capped": sa.softmax(CAUSAL & single(5), logits_soft_cap=2.0, sink=True),
    "documents": CAUSAL & sa.segments() & single(5),
    "chunks": sa.selections.chunk_budget(13, **CHUNKS),
    "chunks by block": sa.selections.chunk_budget(13, **CHUNKS, by_block=True),
    "few chunks beside": sa.selections.chunk_budget(4, **CHUNKS, by_block=True)
                         | sa.window(9) & sa.causal(),
}  # fmt: skip


def arrays(n, heads=4, kv_heads=2, batch=2, dim=8, m=None):
    rng = np.random.default_rng(n)
    m = m or n

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    qkv = normal(batch, n, heads, dim), normal(batch, m, kv_heads, dim)
    qkv = (*qkv, normal(batch, m, kv_heads, dim + 3))
    operands = {
        "iq": normal(batch, n, 8, 6),
        "ik": normal(batch, m, 1, 6),
        "iw": normal(batch, n, 8),
        "sink": normal(heads),
        "boundaries": jnp.asarray(rng.integers(0, 5, (batch, m)) == 0),
    }
    return qkv, operands


def read(spec, operands):
    spec = spec if isinstance(spec, sa.Softmax) else sa.softmax(spec)
    return {name: x for name, x in operands.items() if spec.reads(name)}


def gradients(spec, qkv, operands, **options):
    def run(*qkv):
        out, lse = sa.attention(
            *qkv, spec, operands=operands, return_lse=True, **options
        )
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        some = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(out * weight) + jnp.sum(some), (out, lse)

    found, rest = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*qkv)
    return (*rest, *found)


def assert_equal(found, wanted, tolerance=2e-5):
    for x, y in zip(found, wanted, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(y).max()))


def uses_lists(spec, qkv, config):
    spec = spec if isinstance(spec, sa.Softmax) else sa.softmax(spec)
    setting = Setting(1.0, config=config)
    found = form_of(options_of(qkv, spec, setting), qkv[1].shape[2], {})
    return found is not None


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 37])
def test_lists_equal_bits(name, n):
    spec = CASES[name]
    qkv, operands = arrays(n)
    operands = read(spec, operands)
    ids = {}
    if name == "documents":
        held = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, n))))
        ids = {"q_segment_ids": held, "kv_segment_ids": held}
    found = gradients(spec, qkv, operands, config=LISTS, **ids)
    wanted = gradients(spec, qkv, operands, impl="reference", **ids)
    assert_equal(found, wanted)
    if n > 1 and not ids:
        assert uses_lists(spec, qkv, LISTS)
        assert not uses_lists(spec, qkv, BITS)


def form_at(n, spec=None, **options):
    """The form of a call of 8 heads on one key head, by shapes alone."""
    q, k = (jax.ShapeDtypeStruct((1, n, h, 64), jnp.float32) for h in (8, 1))
    spec = sa.softmax(CAUSAL & single(512)) if spec is None else spec
    return form_of(options_of((q, k), spec, Setting(1.0, **options)), 1, {})


def test_counts_decide_between_lists_and_bits():
    assert form_at(4096) is None
    assert form_at(32768) is not None
    assert form_at(32768, impl="tpu") is None
    assert form_at(32768, impl="reference") is None
    assert form_at(32768, dropout_rate=0.1) is None
    assert form_at(32768, config=BITS) is None
    biased = sa.softmax(CAUSAL & single(512), bias=sa.alibi())
    assert form_at(32768, biased, config=LISTS) is None
    # Pairs that a choice takes away cannot be listed.
    assert form_at(32768, sa.softmax(CAUSAL - single(512)), config=LISTS) is None


def test_explain_says_which_form_and_why():
    shapes = (1, 16384, 8, 64), (1, 16384, 1, 64)
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    index = {"iq": (16384, 4, 32), "ik": (16384, 1, 32), "iw": (16384, 4)}
    given = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in index.items()}
    low = sa.lower(CAUSAL & single(512), q, k, k, target="cpu", operands=given)
    facts = dict(low.explain().facts)
    assert facts["choice"].startswith("by lists: lists cost as much as")


def test_a_query_without_an_eligible_key_yields_nothing():
    (q, k, v), operands = arrays(9)
    later = CAUSAL & ~sa.window(0)
    spec = single(3, eligible=later)
    given = read(spec, operands)
    found = gradients(spec, (q, k, v), given, config=LISTS)
    out, lse = (np.asarray(x) for x in found[:2])
    assert (out[:, 0] == 0).all()
    assert np.isneginf(lse[:, :, 0]).all()
    assert all(np.isfinite(x).all() for x in found[2:])
    assert_equal(found, gradients(spec, (q, k, v), given, impl="reference"))


def test_traced_entries_outside_of_the_keys_stand_for_none():
    (q, k, v), _ = arrays(6)
    choice = single(3, score="mean")
    good = np.array([[0, 6, 6], [0, 1, 6], [1, 2, 6], [0, 3, 6], [3, 4, 6], [0, 5, 6]])
    bad = np.where(good == 6, [[-1, 7, 2**31 - 1]], good)

    @jax.jit
    def run(listed):
        given = {choice.key("listed"): listed}
        return sa.attention(q, k, v, CAUSAL & choice, operands=given, config=LISTS)

    wanted = run(jnp.asarray(good[None], jnp.int32))
    np.testing.assert_array_equal(run(jnp.asarray(bad[None], jnp.int32)), wanted)
    as_bits = sa.attention(
        q, k, v, CAUSAL & choice, config=BITS,
        operands={choice.key("listed"): good[None].astype(np.int32)},
    )  # fmt: skip
    np.testing.assert_allclose(as_bits, wanted, atol=2e-6)
