"""Forward mode and second order through the public call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import BACKENDS, arrays
from jax.test_util import check_grads

import sadsl as sa
from sadsl.selections import kmeans, lsh
from sadsl.terms.base import reads

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")


def call(spec, **options):
    """Output and lse, finite: a constant for a query that sees nothing."""

    def f(q, k, v):
        out, lse = sa.attention(q, k, v, spec, return_lse=True, **options)
        return out, jnp.where(jnp.isneginf(lse), 0.0, lse)

    return jax.jit(f)


@pytest.mark.slow
def test_both_modes_and_both_mixed_against_differences():
    q, k, v, _ = arrays(1, 13, 13, 2, 1, 4, 3)
    spec = sa.softmax(sa.causal() & sa.window(5) & ~sa.queries(3, 5), 4.0)
    f = call(spec, impl="xla")
    check_grads(f, (q, k, v), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_jacobians_and_hessians_are_those_of_the_reference():
    q, k, v, do = arrays(1, 7, 7, 1, 1, 3, 3)

    def found(impl):
        f = call("causal() & ~queries(2, 4)", impl=impl)
        loss = lambda k: jnp.vdot(f(q, k, v)[0], do)
        _, linear = jax.linearize(f, q, k, v)
        return jax.jacfwd(f, argnums=2)(q, k, v), jax.hessian(loss)(k), linear(k, v, q)

    exact = jax.tree.leaves(found("reference"))
    for a, b in zip(jax.tree.leaves(found("xla")), exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        sa.causal() & (sa.window(3) | sa.topk(2, block=4, scope="head")),
        # Positions sorted at run time, and copied to slots of clusters.
        sa.causal() & lsh(4, kind="signs"),
        sa.scatter_mean(sa.causal() & kmeans(3, 9)),
    ],
    ids=["topk", "sorted", "slots"],
)
@pytest.mark.slow
def test_plans_made_at_run_time(spec):
    """Every head and batch entry has its own choice, which has no derivative."""
    q, k, v, do = arrays(2, 26, 26, 2, 2, 4, 4)
    numbers = lambda *shape: jnp.cos(jnp.arange(float(np.prod(shape)))).reshape(shape)
    every = {"centroids": numbers(2, 3, 4), "projections": numbers(2, 1, 4, 2)}
    config = sa.KernelConfig(block_q=8, block_kv=8)
    given = {name: x for name, x in every.items() if reads(spec, name)}

    def found(impl):
        options = {"impl": impl, "config": config, "operands": given}
        f = lambda *x: sa.attention(*x, spec, **options)
        slope = jax.grad(lambda *x: jnp.vdot(f(*x), do), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (jax.jvp(f, x, x), jax.jvp(slope, x, x)))(q, k, v)

    exact = jax.tree.leaves(found("reference"))
    for a, b in zip(jax.tree.leaves(found("xla")), exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("impl", ["tpu", "triton"])
def test_kernels_have_no_forward_mode(impl):
    q, k, v, _ = arrays(1, 13, 13, 1, 1, 16, 16)
    f = call("causal()", impl=impl, **BACKENDS[impl])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (q, k, v), (q, k, v))
