"""Forward mode and second derivatives of the XLA backend, against dense float64."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec
from kernel_cases import Case, Pattern

from pallas_kernels import dispatch
from pallas_kernels.call import Outputs, PairValues, ScoreValues
from pallas_kernels.config import Tile
from pallas_kernels.xla import walks

# Compiled without optimisations: no test here measures speed.
pytestmark = pytest.mark.usefixtures("quick")

BLOCK = Tile(block_q=16, block_kv=16)
SMALL = Case(
    pattern=Pattern("sinks"),
    q_len=45, kv_len=45, q_heads=4, kv_heads=2, dim=8, dim_v=12,
    soft_cap=3.0, forward=BLOCK, dkv=BLOCK,
)  # fmt: skip
HOLES = Case(
    pattern=Pattern("holes"), q_len=90, kv_len=77, q_heads=2, kv_heads=2, dim=8,
    dim_v=8, batch=1, forward=BLOCK, dkv=BLOCK,
)  # fmt: skip
TINY = Case(q_len=13, kv_len=13, q_heads=2, kv_heads=1, dim=4, dim_v=4)


@dataclass(frozen=True)
class Product:
    """A score function that is not linear in its values."""

    def __call__(self, q, k, q_values, kv_values, pairs):
        away = 0.05 * (q - k).astype(q_values[0].dtype)
        return q_values[0] * (away + kv_values[0]) + pairs[0] * pairs[1]


def attend(case, scores=None):
    """``f(inputs, scores)`` through ``dispatch.attend``."""
    masks, vectors = case.masks(), case.vectors()
    call = replace(case.call(), scores=scores, learned_scores=scores is not None)

    def f(x):
        inputs, values = x
        own = vectors._replace(scores=values)
        return dispatch.attend(inputs, own, masks, call, impl="xla")

    return f


def dense(case, scores=None):
    """The definition over all pairs, which JAX differentiates."""
    pairs = jnp.asarray(case.pairs())
    group = case.q_heads // case.kv_heads

    def f(x):
        (q, k, v), values = x
        k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * case.dim**-0.5
        if case.soft_cap is not None:
            s = case.soft_cap * jnp.tanh(s / case.soft_cap)
        if scores is not None:
            q_ids, k_ids = jnp.arange(case.q_len)[:, None], jnp.arange(case.kv_len)
            s += scores(
                q_ids[None, None],
                k_ids[None, None, None],
                [x[..., None] for x in values.q],
                [x[:, :, None] for x in values.kv],
                [
                    x.values[..., q_ids - k_ids[None] + case.kv_len - 1]
                    if x.diagonal
                    else x.values
                    for x in values.pairs
                ],
            )
        row = pairs.any(axis=-1)
        s = jnp.where(pairs, s, jnp.where(row[..., None], -jnp.inf, 0.0))
        lse = jax.nn.logsumexp(s, axis=-1)
        p = jnp.where(pairs, jnp.exp(s - lse[..., None]), 0.0)
        lse = jnp.where(row, lse, -jnp.inf)
        return Outputs(jnp.einsum("bhqk,bhkd->bhqd", p, v), lse)

    return f


def operands(case, scores=None):
    """A point, two directions, and cotangents of the outputs."""
    rng = np.random.default_rng(7)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    inputs, *cotangents = case.arrays()
    values = ScoreValues()
    if scores is not None:
        n, m = case.q_len, case.kv_len
        every = PairValues(normal(1, case.q_heads, n, m))
        diagonal = PairValues(normal(case.batch, 1, n + m - 1), diagonal=True)
        values = ScoreValues(
            (normal(1, case.q_heads, n),),
            (normal(case.batch, 1, m),),
            (every, diagonal),
        )
    x = inputs, values
    u, w = (jax.tree.map(lambda x: normal(*x.shape), x) for _ in range(2))
    return x, u, w, tuple(cotangents)


def inner(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(jnp.vdot(x, y) for x, y in pairs)


def along(f, x, u):
    return jax.jvp(f, (x,), (u,))[1]


def pulled(f, x, c):
    return jax.vjp(f, x)[1](Outputs(*c))[0]


def derivatives(f, x, u, w, c):
    """First derivatives in forward mode, and second ones in all pairs of modes."""
    return {
        "fwd": along(f, x, u),
        "fwd fwd": along(lambda x: along(f, x, u), x, w),
        "fwd rev": along(lambda x: pulled(f, x, c), x, w),
        "rev fwd": jax.grad(lambda x: inner(along(f, x, u), c))(x),
        "rev rev": jax.grad(lambda x: inner(pulled(f, x, c), w))(x),
        "rev rev, cotangents": jax.grad(lambda c: inner(pulled(f, x, c), w))(c),
    }


def hessian_product(f, x, c, w):
    return along(lambda x: pulled(f, x, c), x, w)


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)


def assert_close(found, expected, what=""):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for i, (a, b) in enumerate(pairs):
        oracle.assert_close(a, np.asarray(b), "float32", f"{what} {i}")


def check(case, function=derivatives, scores=None):
    narrow = operands(case, scores)
    found = jax.jit(partial(function, attend(case, scores)))(*narrow)
    with jax.enable_x64(True):
        expected = jax.jit(partial(function, dense(case, scores)))(*wide(narrow))
    for name, values in expected.items():
        assert_close(found[name], values, name)
    return found


@pytest.mark.slow
def test_every_mode_up_to_the_second_order():
    check(SMALL, scores=Product())


@pytest.mark.slow
def test_long_rows_and_rows_without_a_key(monkeypatch):
    monkeypatch.setattr(walks, "SHORT", 0)
    monkeypatch.setattr(walks, "CHUNK", 32)
    found = check(HOLES)
    # Rows 40 to 79 select no key.
    for name in ("fwd", "fwd fwd"):
        for x in found[name]:
            assert not np.asarray(x[:, :, 40:80]).any(), name
            assert np.asarray(x[:, :, :40]).any(), name


@pytest.mark.slow
def test_heads_of_different_maps():
    def two(f, x, u, w, c):
        return {"fwd": along(f, x, u), "fwd rev": hessian_product(f, x, c, w)}

    case = replace(TINY, pattern=Pattern("two maps", maps=2), q_len=40, kv_len=40)
    check(replace(case, kv_heads=2), two)


@pytest.mark.slow
def test_third_order():
    """Third derivatives are dense; that of ``<c, f>`` is symmetric in both modes."""

    def third(f, x, u, w, c):
        product = lambda x: hessian_product(f, x, c, w)
        return {
            "fwd": along(product, x, u),
            "rev": jax.grad(lambda x: inner(product(x), u))(x),
        }

    check(replace(TINY, pattern=Pattern("strided")), third, Product())
    check(replace(HOLES, q_len=50, kv_len=20), third)


@pytest.mark.slow
def test_vmap_of_some_operands_and_derivatives_of_vmap():
    f = attend(TINY)
    x, u, _, c = operands(TINY)
    one = jax.jit(partial(hessian_product, f))(x, c, u)
    twice = lambda t: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), t)
    each = jax.vmap(partial(hessian_product, f), (None, None, 0))
    both = jax.jit(jax.vmap(each, (None, 0, None)))(x, twice(c), twice(u))
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a[1, 1], 4 * b, rtol=1e-5, atol=1e-5)

    # All examples share the keys: their derivatives are summed.
    inputs, values = x
    many = jnp.stack([inputs.q, -inputs.q])
    at = lambda q, k: f((inputs._replace(q=q, k=k), values)).o
    mapped = lambda k: jax.vmap(at, (0, None))(many, k)
    looped = lambda k: jnp.stack([at(q, k) for q in many])

    def of(g):
        slope = jax.grad(lambda k: jnp.sum(jnp.sin(g(k))))
        return jax.jit(lambda k: jax.jvp(slope, (k,), (u[0].k,)))(inputs.k)

    for a, b in zip(of(mapped), of(looped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_remat_shard_map_and_half_precision():
    x, u, _, c = operands(TINY)
    f = attend(TINY)
    plain = jax.jit(partial(hessian_product, f))(x, c, u)
    names = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")
    kept = jax.checkpoint(f, policy=names)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")
    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False
    )
    for g in (kept, sharded):
        assert_close(jax.jit(partial(hessian_product, g))(x, c, u), plain)
    half = lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t)
    found = jax.jit(partial(along, f))(half(x), half(u))
    assert found.o.dtype == jnp.bfloat16
    exact = jax.jit(partial(along, dense(TINY)))(x, u)
    oracle.assert_close(found.o, np.asarray(exact.o), "bfloat16")


@pytest.mark.optimised
def test_what_the_first_order_keeps_and_runs():
    """Residuals are inputs, outputs, row totals and lists, without zeros."""
    f = attend(TINY)
    x, *_ = operands(TINY)
    inputs, values = x
    outputs = f(x)

    def floats(g, *args):
        _, pull = jax.vjp(g, *args)
        kept = jax.tree.leaves(pull)
        return sum(x.size for x in kept if jnp.issubdtype(x.dtype, jnp.floating))

    every = sum(x.size for x in (*inputs, *outputs, outputs.lse))
    assert floats(f, x) == every
    assert floats(lambda q: f((inputs._replace(q=q), values)), inputs.q) == every
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(f(x).o)))(x))
    assert text.count("attention_derivative") == 1


@pytest.mark.slow
@pytest.mark.optimised
def test_memory_is_linear_in_every_mode():
    n = 2048
    case = Case(
        pattern=Pattern("window"), batch=1, q_heads=1, kv_heads=1, q_len=n, kv_len=n,
        forward=Tile(block_q=128, block_kv=128), dkv=BLOCK,
    )  # fmt: skip
    f = attend(case)
    x, _, w, c = operands(case)
    products = {
        "fwd rev": lambda x: hessian_product(f, x, c, w),
        "rev rev": jax.grad(lambda x: inner(pulled(f, x, c), w)),
    }
    for name, g in products.items():
        memory = jax.jit(g).lower(x).compile().memory_analysis()
        # The scores of all pairs alone would take 16 MiB.
        assert memory.temp_size_in_bytes < n * n, name
