"""Running ``local_linear``: gradients, ways to solve, and what misses the tolerance."""

from functools import partial

import jax
import jax.numpy as jnp
import local_linear_oracle
import numpy as np
import oracle
import pytest

import sadsl as sa
from pallas_kernels import solve

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")
SMALL = sa.KernelConfig(block_q=8, block_kv=8)
HEADS, KV_HEADS = 2, 1


def arrays(n, dim=4, dtype="float32", seed=0):
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = [(2, n, h, dim) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


# --- gradients ---


def test_gradients_are_differences_of_the_definition():
    """Along random directions of q, k, v and the ridge, in float64."""
    n, scale, step = 13, 0.4, 1e-5
    map_ = sa.causal() & sa.window(7) - sa.queries(3, 5)
    pairs = map_.dense(n, num_heads=HEADS)[None]
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        *inputs, do = arrays(n, dtype="float64")
        args = *inputs, jnp.asarray([0.1, 0.5])
        moves = [rng.normal(size=(3, *x.shape)) for x in args]

        def loss(q, k, v, ridge):
            spec, given = sa.local_linear(map_, "r"), {"r": ridge}
            out = sa.attention(
                q, k, v, spec, operands=given, sm_scale=scale, config=SMALL
            )
            return jnp.sum(out * do)

        slopes = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*args)

    def exact(*args):
        out = local_linear_oracle.attention(*args[:3], pairs, args[3], scale)
        return np.sum(out * np.asarray(do))

    held = [np.asarray(x) for x in args]
    for i in range(3):
        ends = (
            exact(*(x + sign * step * m[i] for x, m in zip(held, moves, strict=True)))
            for sign in (1, -1)
        )
        wanted = (next(ends) - next(ends)) / (2 * step)
        found = sum(np.vdot(s, m[i]) for s, m in zip(slopes, moves, strict=True))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def pulled(spec, inputs, do, dlse, **options):
    """Output, lse, and the gradients of q, k, v and a traced scale."""

    @jax.jit
    def run(q, k, v, do, dlse, scale):
        call = partial(sa.attention, spec=spec, return_lse=True, **options)
        found, pull = jax.vjp(lambda *x: call(*x[:3], sm_scale=x[3]), q, k, v, scale)
        return *found, *pull((do, dlse))

    return run(*inputs, do, dlse, jnp.asarray(0.3, inputs[0].dtype))


CHOSEN = sa.topk(2, block=8)
WAYS = {
    "formed": (4, sa.local_linear(sa.causal(), 0.1)),
    "iterated": (24, sa.local_linear(sa.causal(), 1.0, 1e-5)),
    "formed after iterations": (24, sa.local_linear(sa.causal(), 0.01)),
    "large": (136, sa.local_linear(sa.causal(), 1.0, 1e-5)),
    "few iterations": (8, sa.local_linear(sa.causal() & sa.window(1), 0.1, 1e-3, 2)),
    "chosen": (4, sa.local_linear(sa.causal() & (sa.window(2) | CHOSEN), 0.1)),
    "strided": (4, sa.local_linear(sa.causal() & sa.strided(4), 0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_solve_agrees_with_the_dense_definition(name):
    dim, spec = WAYS[name]
    *inputs, do = arrays(37, dim)
    dlse = jnp.asarray(np.random.default_rng(5).normal(size=(2, HEADS, 37)), "float32")
    found = pulled(spec, inputs, do, dlse, config=SMALL)
    if name == "chosen":
        # The choice is made in float32, on both sides.
        wanted = pulled(spec, inputs, do, dlse, impl="reference")
        wanted = [np.asarray(x, np.float64) for x in wanted]
    else:
        with jax.enable_x64(True):
            wide = [x.astype(jnp.float64) for x in (*inputs, do, dlse)]
            spec = sa.local_linear(spec.map, spec.ridge)
            wanted = pulled(spec, wide[:3], *wide[3:], impl="reference")
            wanted = [np.asarray(x) for x in wanted]
    # An error is the residual times the condition of the system.
    loose = "few iterations", "formed after iterations"
    tolerance = 1e-2 if name in loose else 2e-4
    for a, b in zip(found, wanted, strict=True):
        worst = float(np.abs(np.asarray(a, np.float64) - b).max())
        assert worst <= tolerance * max(1.0, float(np.abs(b).max()))


@pytest.mark.slow
def test_systems_that_iterations_do_not_solve_are_formed():
    q, k, *_ = arrays(37, 24)
    dim, spec = WAYS["formed after iterations"]
    most = solve.Accuracy(spec.tolerance).most(dim)
    bounded = sa.local_linear(spec.map, spec.ridge, iterations=most)
    found = (sa.local_linear_residual(x, q, k).max() for x in (bounded, spec))
    assert next(found) > 10 * spec.tolerance
    assert next(found) <= spec.tolerance


def test_forming_is_chosen_by_size():
    usual, given = solve.Accuracy(1e-4), solve.Accuracy(1e-4, 7)
    assert [usual.forms_at_once(d) for d in (16, 17)] == [True, False]
    assert [usual.forms_later(d) for d in (16, 17, 128, 129)] == [
        False,
        True,
        True,
        False,
    ]
    assert [usual.most(d) for d in (64, 256)] == [48, 512]
    assert not given.forms_at_once(4)
    assert not given.forms_later(64)
    assert given.most(64) == 7


@pytest.mark.slow
def test_a_row_of_many_blocks():
    """More keys than one step takes, so that tiles are made anew for each fold."""
    *inputs, do = arrays(2300)
    spec = sa.local_linear(sa.causal(), 0.1)
    dlse = jnp.zeros((2, HEADS, 2300), jnp.float32)
    found = pulled(spec, inputs, do, dlse)
    wanted = pulled(spec, inputs, do, dlse, impl="reference")
    for a, b in zip(found, wanted, strict=True):
        oracle.assert_close(a, np.asarray(b, np.float64), "float32")


@pytest.mark.slow
def test_second_derivatives():
    *inputs, _ = arrays(13)

    def bent(impl, *inputs):
        spec = sa.local_linear(sa.causal(), 0.5)
        loss = lambda *x: jnp.sum(jnp.square(sa.attention(*x, spec, impl=impl)))
        slope = lambda *x: sum(map(jnp.sum, jax.grad(loss, (0, 1, 2))(*x)))
        return jax.jit(jax.grad(slope, (0, 1, 2)))(*inputs)

    for a, b in zip(bent("xla", *inputs), bent("reference", *inputs), strict=True):
        oracle.assert_close(a, np.asarray(b, np.float64), "float32")


@pytest.mark.slow
def test_documents_offsets_and_half_precision():
    q, k, v, _ = arrays(37)
    ids = np.arange(37)[None] // 9
    spec = sa.local_linear(sa.causal() & sa.segments(), 0.1)
    ids = {"q_segment_ids": ids[:, 30:], "kv_segment_ids": ids}
    found = sa.attention(q[:, 30:], k, v, spec, q_offset=30, config=SMALL, **ids)
    same = ids["q_segment_ids"][0][:, None] == ids["kv_segment_ids"]
    pairs = same & (np.arange(37) <= np.arange(30, 37)[:, None])
    pairs = np.broadcast_to(pairs, (1, HEADS, 7, 37))
    args = q[:, 30:], k, v, pairs, (0.1, 0.1), 0.5
    wanted = local_linear_oracle.attention(*args)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    spec = sa.local_linear(sa.full(), 0.1)
    found = sa.attention(q, k, v, spec)
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    pairs = np.ones((1, HEADS, 37, 37), bool)
    wanted = local_linear_oracle.attention(*wide, pairs, (0.1, 0.1), 0.5)
    oracle.assert_close(found, wanted, "bfloat16")


@pytest.mark.slow
def test_shards_and_symbolic_batches():
    *inputs, _ = arrays(13, 24)
    call = partial(sa.attention, spec=sa.local_linear(sa.causal(), 1.0))
    wanted = call(*inputs)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec("x")
    sharded = jax.shard_map(call, mesh=mesh, in_specs=(over,) * 3, out_specs=over)
    np.testing.assert_allclose(jax.jit(sharded)(*inputs), wanted, atol=1e-5)
    (batch,) = jax.export.symbolic_shape("batch")
    like = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs]
    exported = jax.export.export(jax.jit(call))(*like)
    np.testing.assert_allclose(exported.call(*inputs), wanted, atol=1e-5)


# --- the tolerance ---

FEW = sa.local_linear(sa.causal(), 0.5, iterations=1)


def test_an_eager_call_that_misses_the_tolerance_is_refused():
    *inputs, _ = arrays(13)
    match = (
        r"iterations=1\): the residual of a system is .*, above the tolerance 1.0e-04"
    )
    with pytest.raises(FloatingPointError, match=match):
        sa.attention(*inputs, FEW)
    with pytest.raises(FloatingPointError, match="raise the ridge or the tolerance"):
        jax.grad(lambda *x: sa.attention(*x, FEW).sum())(*inputs)
    lost = sa.local_linear(sa.causal(), 1e-12)
    with pytest.raises(FloatingPointError, match="residual of a system is nan"):
        sa.attention(*inputs, lost, impl="reference")


def test_traced_queries_that_miss_the_tolerance_are_nan():
    *inputs, do = arrays(13)

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: sa.attention(*x, FEW), q, k, v)
        return out, *pull(do)

    out, dq, *_ = run(*inputs)
    met = np.isfinite(np.asarray(out)).all(axis=-1)
    # With one key the matrix is the ridge alone, which one iteration inverts.
    assert met[:, 0].all()
    assert not met[:, 3:].any()
    np.testing.assert_array_equal(np.isnan(dq).all(axis=-1), ~met)


@pytest.mark.slow
def test_the_residual_is_that_of_the_definition():
    """With one iteration ``x`` is a multiple of ``q - m``, by the method's formula."""
    q, k, *_ = arrays(7)
    found = sa.local_linear_residual("local_linear(full(), 0.5, iterations=1)", q, k)
    dense = sa.local_linear_residual(FEW, q, k, impl="reference")
    assert float(dense.max()) < 1e-5
    for b, h, i in np.ndindex(2, HEADS, 7):
        point, keys = (np.asarray(x, np.float64) for x in (q[b, i, h], k[b, :, 0]))
        p = np.exp(keys @ point * 0.5)
        p /= p.sum()
        u = keys - p @ keys
        a, right = (u * p[:, None]).T @ u + 0.5 * np.eye(4), point - p @ keys
        x = right * (right @ right) / (right @ a @ right)
        wanted = np.linalg.norm(right - a @ x) / np.linalg.norm(right)
        np.testing.assert_allclose(found[b, h, i], wanted, rtol=1e-3)


def test_the_residual_of_other_terms_is_refused():
    q, k, *_ = arrays(7)
    with pytest.raises(TypeError, match="takes a local_linear"):
        sa.local_linear_residual(sa.causal(), q, k)


# --- what a call cannot do ---


def test_what_it_cannot_do_is_refused():
    *inputs, _ = arrays(7)
    call = partial(sa.attention, *inputs, sa.local_linear(sa.causal(), 1.0))
    for impl in ("tpu", "triton"):
        with pytest.raises(NotImplementedError, match="pass impl='xla', which runs on"):
            call(impl=impl, interpret=True)
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0.1: a regression"):
        call(dropout_rate=0.1, dropout_key=jax.random.key(0))
    spec, (q, k, v) = sa.local_linear(sa.causal(), 1.0), inputs
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: sa.attention(q, k, v, spec), (q,), (q,))


def test_a_ridge_that_does_not_fit_is_refused():
    *inputs, _ = arrays(7)
    spec = sa.local_linear(sa.causal(), "ridge")
    call = partial(sa.attention, *inputs, spec)
    with pytest.raises(
        ValueError, match="'ridge', which was not given: pass operands="
    ):
        call()
    with pytest.raises(ValueError, match=r"shape \(3,\): the ridge of .* shape \(2,\)"):
        call(operands={"ridge": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"has the entry -1.0: .*must be positive"):
        call(operands={"ridge": jnp.array([1.0, -1.0])})
    with pytest.raises(ValueError, match=r"no part of .* reads it"):
        call(operands={"ridge": jnp.ones(2), "other": jnp.ones(2)})
