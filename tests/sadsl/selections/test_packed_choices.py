"""Choices packed by strips of rows: the same bits, in an eighth of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import pipeline
from lowering.problem import Problem
from lowering.run_time import pair_bits
from lowering.run_time.packed import packed
from sadsl.selections import base, cell_scores, rules, tiles

BITS = sa.KernelConfig(lists=False)
CAUSAL = sa.causal()
BY_HEAD = CAUSAL & sa.where(lambda q, k, h: q - k < 9 + 5 * h)
SPECS = {
    "keys": sa.topk(5, block=1, block_q=1, eligible=CAUSAL),
    "keys by head": sa.topk(5, block=1, block_q=1, eligible=BY_HEAD, scope="group"),
    "keys of all heads": sa.threshold(0.1, block=1, block_q=1, scope="shared"),
    "share of keys": sa.mass(0.6, block=1, block_q=1, eligible=CAUSAL),
    "some forced": sa.topk(4, block=1, block_q=1, eligible=CAUSAL,
                           forced=sa.window(2), rules=rules(at_least=2)),
    "nothing but forced": sa.threshold(1e9, block=1, block_q=1, eligible=CAUSAL,
                                       forced=sa.sinks(1),
                                       rules=rules(otherwise="eligible")),
    "whole cells": sa.mass(0.5, block=2, block_q=3, eligible=CAUSAL,
                           score=sa.selections.scored(
                               "mean", normalise="whole_softmax")),
    "budget of a head": sa.topk(3, block=1, block_q=1, scope="head"),
    "blocks": sa.topk(2, block=8, eligible=CAUSAL),
}  # fmt: skip


def content(n, batch=2, heads=4, kv_heads=2, dim=8):
    rng = np.random.default_rng(n)
    q, k = (jnp.asarray(rng.normal(size=(batch, h, n, dim)), jnp.float32)
            for h in (heads, kv_heads))  # fmt: skip
    return base.Content(q, k, {}, sm_scale=dim**-0.5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SPECS)
def test_strips_choose_as_the_whole_does(name, monkeypatch):
    spec, given = SPECS[name], content(37)
    wanted = np.asarray(spec.choose(given)["chosen"])
    monkeypatch.setattr(cell_scores, "LIMIT", 1500)  # a few rows in a strip
    found = spec.choose_packed(given)["chosen"]
    assert found.shape == wanted.shape
    assert found.words.dtype == jnp.uint32
    assert wanted.any()
    np.testing.assert_array_equal(found.bools(), wanted)


def test_forced_cells_alone_keep_all_that_is_eligible():
    found = SPECS["nothing but forced"].choose_packed(content(13))["chosen"]
    np.testing.assert_array_equal(
        found.bools(), np.broadcast_to(np.tri(13, dtype=bool), (2, 4, 13, 13))
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("block_q", "block", "lengths", "block_kv"),
    [
        (1, 1, (37, 130), 64),
        (1, 1, (130, 97), 16),
        (3, 5, (130, 130), 32),
        (1, 3, (37, 200), 100),
        (1, tiles((8, 16), (2, 4)), (37, 128), 32),
    ],
)
@pytest.mark.parametrize("scope", ["query", "shared"])
def test_packed_bools_become_the_same_bits(block_q, block, lengths, block_kv, scope):
    spec = sa.topk(3, block=block, block_q=block_q, scope=scope)
    (pred,) = pipeline.run(spec.node, Problem(*lengths, 2))["hoist"].bits
    columns = -(-lengths[1] // block) if isinstance(block, int) else 16
    shape = 2, -(-lengths[0] // block_q), columns
    shape = shape if scope == "query" else shape[1:]
    bools = jnp.asarray(np.random.default_rng(0).random((3, *shape)) < 0.4)
    wanted, found = (
        pair_bits.pack((pred,), lengths, block_kv, 2, {spec.key("chosen"): x}, (64,))[0]
        for x in (bools, packed(bools))
    )
    assert found.keys_per_bit == wanted.keys_per_bit
    assert found.queries_per_word == wanted.queries_per_word
    np.testing.assert_array_equal(*map(of_pairs, (found, wanted)))
    np.testing.assert_array_equal(packed(bools).bools(), bools)


def of_pairs(bits):
    """The bit of every pair, from the words that kernels read."""
    words, bit = np.asarray(bits.words), np.asarray(bits.bit)
    plane = np.arange(len(bit)) // bits.block_kv // bits.blocks_per_plane
    return words[:, :, plane, bit // 32] >> (bit % 32)[:, None] & 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_given_bools_are_packed_too(impl):
    spec = CAUSAL & SPECS["keys"]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 37, 2, 8)), jnp.float32)
               for _ in range(3))  # fmt: skip
    run = jax.jit(lambda **more: sa.attention(q, k, v, spec, config=BITS, **more))
    given = run(operands=sa.select(spec, q, k))
    wanted = sa.attention(q, k, v, spec, impl=impl, config=BITS)
    np.testing.assert_allclose(given, wanted, atol=2e-5)


def temporary(spec, n, heads=2):
    x = jax.ShapeDtypeStruct((1, n, heads, 32), jnp.float32)
    call = jax.jit(lambda *qkv: sa.attention(*qkv, spec, config=BITS))
    compiled = call.lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_choice_of_keys_takes_bits_not_bytes():
    n, heads = 4096, 2
    most = temporary(CAUSAL, n) + heads * n * n / 4
    assert temporary(CAUSAL & SPECS["keys"], n) < most
