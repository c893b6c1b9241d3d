"""Outputs and gradients with every kind of bias, against float64."""

from dataclasses import dataclass
from typing import Any

import calls
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from t5_buckets import bucket_of

import sadsl as sa
from sadsl.maps.numbers import weights
from sadsl.maps.symbols import operand, table
from sadsl.terms.biases import (
    Bias,
    alibi,
    bias,
    distance_bias,
    key_bias,
    pair_bias,
    t5_bias,
)

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

HEADS, KV_HEADS, Q_LEN, KV_LEN, OFFSET = 4, 2, 50, 61, 3
# A hole of two queries that see nothing, and keys that all see.
MAP = (sa.causal() | sa.sinks(3)) - sa.queries(20, 22)


def bucket_of_pair(q, k, num_buckets=8, max_distance=20):
    """Both sides: the later keys have the second half of the buckets."""
    later = k > q
    side = bucket_of(abs(k - q), num_buckets // 2, max_distance)
    return side + (num_buckets // 2 if later else 0)


def slopes_of(heads):
    """Geometric, from the power of two down: a power of two of heads."""
    return np.array([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)])


def of_pairs(f):
    """``f(q, k)`` of all pairs of true positions, ``[q, k]``."""
    q, k = np.arange(Q_LEN) + OFFSET, np.arange(KV_LEN)
    return np.array([[f(a, b) for b in k.tolist()] for a in q.tolist()])


@dataclass(frozen=True)
class Case:
    """A bias, the shapes of what it reads, and the definition of it in NumPy."""

    bias: Bias
    shapes: dict[str, tuple[int, ...]]
    # dense(learned) -> [batch or 1, heads or 1, q, k]
    dense: Any
    soft_cap: float | None = None


def _layouts(x):
    """A bias of every layout at once."""
    distance = of_pairs(lambda q, k: float(abs(q - k)))
    sloped = slopes_of(HEADS)[None, :, None, None] * distance
    of_bucket = x["t5"][:, of_pairs(bucket_of_pair)]
    return of_bucket[None] + x["pair"] + x["key"][None, :, None, :] - sloped


def _products(x):
    distance = of_pairs(lambda q, k: float(abs(q - k)))
    of_head = x["slope"][None, :, None, None] * distance[None, None] / 16
    near = x["near"][:, of_pairs(lambda q, k: min(max(q - k, -2), 10) + 2)][None]
    cells = x["cells"][:, of_pairs(lambda q, k: q % 4), of_pairs(lambda q, k: k % 3)]
    keys = of_pairs(lambda q, k: float(k // 8))[None, None]
    of_query = x["query"][:, None, :, None] * keys
    by_head = np.array([0.5, 1.0, -1.0, 2.0])[None, :, None, None]
    return of_head + near - cells[None] + of_query + by_head + 0.25


CASES = {
    "layouts": Case(
        alibi()
        + (t5_bias("t5", 8, 20, bidirectional=True) + pair_bias("pair"))
        + key_bias("key"),
        {"t5": (HEADS, 8), "pair": (2, 1, Q_LEN, KV_LEN), "key": (HEADS, KV_LEN)},
        _layouts,
        soft_cap=3.0,
    ),
    "products": Case(
        bias(
            lambda q, k, h: (
                0.0625 * weights("slope")[h] * abs(q - k)
                - weights("cells")[h, q % 4, k % 3]
                + weights("query")[q] * (k // 8)
                + table((0.5, 1.0, -1.0, 2.0))[h]
                + 0.25
            )
        )
        + distance_bias("near", 10, 2),
        {
            "slope": (HEADS,),
            "near": (1, 13),
            "cells": (HEADS, 4, 3),
            "query": (2, Q_LEN),
        },
        _products,
    ),
}


def made(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def inputs(dim=8):
    return calls.arrays(2, Q_LEN, KV_LEN, HEADS, KV_HEADS, dim, dim)


def expected(case, learned, dlse):
    """Values and gradients by autodiff of the definition, in float64."""
    *qkv, do = inputs()
    pairs = jnp.asarray(MAP.dense(Q_LEN + OFFSET, KV_LEN, HEADS)[:, OFFSET:][None])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*qkv, do, dlse)]
        learned = {
            n: jnp.asarray(np.asarray(x), jnp.float64) for n, x in learned.items()
        }
        q, k, v, do, dlse = wide
        scale = q.shape[-1] ** -0.5

        def loss(q, k, v, learned):
            k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
            if case.soft_cap is not None:
                s = case.soft_cap * jnp.tanh(s / case.soft_cap)
            s = s + jnp.asarray(case.dense(learned))
            some = pairs.any(axis=-1)
            s = jnp.where(pairs, s, -1e300)
            lse = jax.nn.logsumexp(s, axis=-1)
            p = jnp.where(pairs, jnp.exp(s - lse[..., None]), 0.0)
            o = jnp.einsum("bhqk,bkhd->bqhd", p, v)
            total = jnp.sum(o * do) + jnp.sum(jnp.where(some, lse, 0.0) * dlse)
            return total, (o, jnp.where(some, lse, -jnp.inf))

        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
        gradients, values = found(q, k, v, learned)
        return jax.tree.map(np.asarray, (*values, *gradients))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "impl"),
    [("products", "reference"), ("products", "xla")]
    + [("layouts", impl) for impl in calls.IMPLS],
)
def test_values_and_gradients(name, impl):
    """Grouped queries, odd lengths, empty rows, a soft cap, an offset."""
    case = CASES[name]
    q, k, v, do = inputs()
    learned = made(case.shapes)
    rng = np.random.default_rng(5)
    dlse = jnp.asarray(rng.normal(size=(2, HEADS, Q_LEN)), jnp.float32)
    term = sa.softmax(MAP, case.soft_cap, case.bias)
    options = calls.BACKENDS[impl] | {"impl": impl, "return_lse": True}

    @jax.jit
    def run(q, k, v, learned):
        def call(q, k, v, learned):
            return sa.attention(
                q, k, v, term, operands=learned, q_offset=OFFSET, **options
            )

        out, pull = jax.vjp(call, q, k, v, learned)
        return *out, *pull((do, dlse))

    found, wanted = run(q, k, v, learned), expected(case, learned, dlse)
    names = ("o", "lse", "dq", "dk", "dv")
    for what, a, b in zip(names, found, wanted, strict=False):
        oracle.assert_close(a, b, "float32", f"{impl} {name} {what}")
    for what in case.shapes:
        a, b = found[5][what], wanted[5][what]
        oracle.assert_close(a, b, "float32", f"{impl} {name} d{what}")


@pytest.mark.slow
def test_sixteen_bits():
    """What is added stays float32, and so does its gradient."""
    q, k, v, do = (x[:, :20].astype("bfloat16") for x in inputs())
    learned = made({"near": (HEADS, 20)})
    spec = sa.softmax(sa.causal(), bias=distance_bias("near", 19))

    def run(learned, impl):
        out = sa.attention(q, k, v, spec, operands=learned, impl=impl)
        return jnp.sum((out * do).astype(jnp.float32))

    found, wanted = (jax.grad(run)(learned, i)["near"] for i in ("xla", "reference"))
    assert found.dtype == jnp.float32
    oracle.assert_close(found, np.asarray(wanted), "bfloat16")


@pytest.mark.slow
def test_a_plan_made_at_run_time():
    """Every batch entry and head walks blocks of its own; shared arrays add up."""
    q, k, v, do = calls.arrays(2, 65, 65, 4, 2, 8, 8)
    learned = made({"near": (4, 9), "pair": (1, 65, 65)})
    reach = sa.where(lambda q, k, h: q - k <= operand("left")[h])
    spec = sa.softmax(
        sa.segments() & reach, bias=distance_bias("near", 8) + pair_bias("pair")
    )
    ids = jnp.asarray(np.arange(65)[None] // np.array([[17], [40]]), jnp.int32)
    left = jnp.array([3, 70, 20, 0])

    def run(learned, impl):
        out = sa.attention(
            q, k, v, spec, operands={**learned, "left": left}, q_segment_ids=ids,
            kv_segment_ids=ids, impl=impl, config=calls.SMALL,
        )  # fmt: skip
        return jnp.sum(out * do)

    found, wanted = (
        jax.jit(jax.grad(run), static_argnums=1)(learned, impl)
        for impl in ("xla", "reference")
    )
    for name in learned:
        oracle.assert_close(found[name], np.asarray(wanted[name]), "float32", name)


def test_forward_mode():
    """Of learned arrays, through every layout, on the path that has it."""
    q, k, v, _ = calls.arrays(1, 20, 20, 2, 1, 4, 4)
    spec = sa.softmax(sa.causal(), bias=distance_bias("near", 3) + pair_bias("pair"))
    shapes = {"near": (2, 4), "pair": (1, 20, 20)}

    def along(learned, moved, impl):
        call = lambda x: sa.attention(q, k, v, spec, operands=x, impl=impl)
        return jax.jvp(call, (learned,), (moved,))[1]

    jitted = jax.jit(along, static_argnums=2)
    found, wanted = (
        jitted(made(shapes), made(shapes, seed=1), impl)
        for impl in ("xla", "reference")
    )
    oracle.assert_close(found, np.asarray(wanted), "float32")


@pytest.mark.slow
def test_second_derivatives_of_kernels():
    """Reverse over reverse goes through plain JAX."""
    q, k, v, do = calls.arrays(1, 20, 20, 2, 1, 4, 4)
    spec = sa.softmax(sa.causal(), 2.0, distance_bias("near", 3) + pair_bias("pair"))
    learned = made({"near": (2, 4), "pair": (1, 20, 20)})

    def steepness(learned, q, impl):
        options = calls.BACKENDS[impl]

        def loss(learned):
            out = sa.attention(q, k, v, spec, operands=learned, impl=impl, **options)
            return jnp.sum(jnp.sin(out) * do)

        return sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.grad(loss)(learned)))

    second = jax.jit(jax.grad(steepness, argnums=(0, 1)), static_argnums=2)
    found, wanted = (second(learned, q, impl) for impl in ("triton", "reference"))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        oracle.assert_close(a, np.asarray(b), "float32")


@pytest.mark.slow
@pytest.mark.optimised
def test_who_asks_for_no_gradient_does_not_pay():
    """The compiler drops the walk that finds it."""
    q, k, v, do = calls.arrays(1, 64, 64, 2, 2, 8, 8)
    spec = sa.softmax(sa.causal(), bias=distance_bias("near", 3))
    learned = made({"near": (2, 4)})

    def loss(q, learned):
        blocks = sa.KernelConfig(block_q=16, block_kv=16)
        out = sa.attention(q, k, v, spec, operands=learned, impl="xla", config=blocks)
        return jnp.sum(out * do)

    def loops(argnums):
        compiled = jax.jit(jax.grad(loss, argnums)).lower(q, learned).compile()
        return compiled.as_text().count(" while(")

    assert 0 < loops((0,)) < loops((0, 1))


@pytest.mark.slow
def test_minus_infinity_leaves_a_pair_out():
    """With gradients that are numbers; all left out: an empty row."""
    q, k, v, do = calls.arrays(1, 20, 20, 2, 2, 4, 4)
    out = np.tril(np.ones((20, 20), bool), -5)
    out[7] = True
    values = jnp.where(jnp.asarray(out), -jnp.inf, 0.5)[None]
    spec = sa.softmax(sa.causal(), bias=pair_bias("pair"))

    def run(values, q, impl):
        options = calls.BACKENDS[impl]
        o, lse = sa.attention(
            q, k, v, spec, operands={"pair": values}, impl=impl, return_lse=True,
            **options,
        )  # fmt: skip
        return jnp.sum(o * do), (o, lse)

    near = sa.causal() & sa.window(4)
    plain = sa.attention(q, k, v, near - sa.queries(7, 8), impl="reference")
    _, (o, _) = run(values, q, "triton")
    oracle.assert_close(o, np.asarray(plain), "float32")
    slope = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
    for impl in ("reference", "xla"):
        gradients, (o, lse) = slope(values, q, impl)
        assert np.isneginf(lse[:, :, 7]).all()
        oracle.assert_close(o, np.asarray(plain), "float32", impl)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert not np.asarray(gradients[0])[0][out].any()
