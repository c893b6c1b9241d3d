"""Neighbouring queries that no index tells apart share the words of their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from lowering import pipeline
from lowering.problem import Problem
from lowering.run_time import pair_bits, pair_groups
from sadsl import catalog
from sadsl.selections import stripes

BITS = sa.KernelConfig(lists=False, block_q=16, block_kv=32)
MASK = "where(lambda q, k, h: operand('m')[h, q // 6, k] == 1)"


def per_word(text, n, blocks_q=(64,), q_offset=0):
    (pred,) = pipeline.run(sa.parse(text).node, Problem(n, n, 2, q_offset))[
        "hoist"
    ].bits
    return pair_groups.queries_per_word(pred, n, blocks_q)


@pytest.mark.parametrize(
    ("index", "n", "wanted"),
    [
        ("[q, k]", 130, 1),
        ("[q // 32, k]", 130, 32),
        ("[h, q // 256, k // 4]", 1000, 256),
        ("[q // 48, k]", 130, 16),  # half of it shares no block of 64 queries
        ("[q // 6 + h, k]", 130, 2),
        ("[(q + h) // 32, k]", 130, 1),  # each head has groups of its own
        ("[q // 256, k]", 130, 256),  # all queries
        ("[q // 32, k // 8 + operand('c')[k]]", 130, 32),
        ("[operand('c')[q // 4], k]", 130, 4),
        ("[operand('c')[q], k]", 130, 1),
        ("[q // 32, k + 0 * (q // 2)]", 130, 32),
    ],
)
def test_groups_follow_from_the_index(index, n, wanted):
    text = f"where(lambda q, k, h: operand('m'){index} == 1)"
    assert per_word(text, n) == wanted


def test_groups_begin_at_the_first_query():
    text = "where(lambda q, k: operand('m')[(q + 3) // 32, k] == 1)"
    assert per_word(text, 130) == 1
    text = "where(lambda q, k: operand('m')[q // 64, k] + q // 32 <= 3)"
    assert [per_word(text, 130, q_offset=x) for x in (0, 32, 40)] == [32, 32, 8]


SPECS = {
    "stripes": stripes(0.5, init=1, block=6, step=2),
    "mask": sa.causal() & sa.parse(MASK),
}


def random(n, heads=2, dim=8):
    rng = np.random.default_rng(n)
    inputs = (jnp.asarray(rng.normal(size=(2, n, heads, dim)), jnp.float32),) * 3
    mask = jnp.asarray(rng.integers(0, 2, (heads, -(-n // 6), n)), jnp.int32)
    return inputs, mask


def result(name, n):
    """Output and gradients of a call."""
    inputs, mask = random(n)
    operands = {"m": mask} if name == "mask" else None

    def of(inputs):
        out = sa.attention(*inputs, SPECS[name], operands=operands, config=BITS)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(of, has_aux=True))(inputs)
    return out, *gradients


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 13, 37, 130])
@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_as_a_word_for_each_query(name, n, monkeypatch):
    shared = result(name, n)
    jax.clear_caches()  # the call is traced again
    calls = []
    monkeypatch.setattr(
        pair_bits, "queries_per_word", lambda *args: calls.append(args) or 1
    )
    for a, b in zip(shared, result(name, n), strict=True):
        np.testing.assert_array_equal(a, b)
    assert calls


def temporary(spec, n, lists=False, heads=2):
    x = jax.ShapeDtypeStruct((1, n, heads, 32), jnp.float32)
    read = sa.softmax(spec).reads("boundaries")
    operands = {"boundaries": jax.ShapeDtypeStruct((n,), jnp.int32)} if read else {}

    def loss(qkv, operands):
        config = sa.KernelConfig(lists=lists)
        out = sa.attention(*qkv, spec, operands=operands or None, config=config)
        return jnp.sum(jnp.sin(out))

    lowered = jax.jit(jax.value_and_grad(loss)).lower((x, x, x), operands)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "lists"),
    [
        (catalog.anchor_attention(), False),
        (catalog.dhsa(by_block=True), False),
        (catalog.dhsa(by_block=True), True),
        (catalog.dhsa(), True),
    ],
    ids=str,
)
def test_memory_is_linear_in_the_length(spec, lists):
    n = 8192
    once, twice = (temporary(spec, x, lists) for x in (n, 2 * n))
    assert twice < 2.1 * once
    if not lists:
        # A word for each query would take (2 n)**2 / 8 bytes a head alone.
        assert twice < n * n
