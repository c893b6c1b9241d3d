"""With 64-bit JAX, float64 runs in float64, and float32 runs as without it."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from calls import BACKENDS, IMPLS

import sadsl as sa
from sadsl import catalog
from sadsl.selections import topk

N, HEADS, KV_HEADS, DIM = 50, 4, 2, 8
NEAR = sa.causal() & sa.window(9)
CLUSTERS = sa.kmeans(3, members="argmax")
MEMBERS = sa.kmeans(3, 20) & sa.causal()


class Case(NamedTuple):
    """A spec, the shapes of its floats, and its other arrays."""

    spec: sa.IndexMap | object
    floats: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    integers: Mapping[str, np.ndarray] = MappingProxyType({})
    rate: float = 0.0
    chooses: bool = False  # what is chosen is chosen in float32
    kernels: bool = True  # whether Pallas has kernels for it


IDS = np.arange(N, dtype=np.int32)[None] // 17
SEGMENTS = {"q_segment_ids": IDS, "kv_segment_ids": IDS}
CENTROIDS = {"centroids": (HEADS, 3, DIM)}
CASES = {
    "causal": Case(sa.causal()),
    "capped, empty rows": Case(
        sa.softmax(NEAR - sa.queries(10, 20), logits_soft_cap=3.0)
    ),
    "sink": Case(sa.softmax(NEAR, sink="s"), {"s": (HEADS,)}),
    "dropout": Case(NEAR, rate=0.3),
    "segments": Case(sa.causal() & sa.segments(), integers=SEGMENTS),
    "heads": Case(sa.heads((NEAR, 2), (sa.causal() & sa.strided(4), 2))),
    "per head": Case(sa.per_head(NEAR, sa.full())),
    "alibi": Case(sa.softmax(NEAR, bias=sa.alibi())),
    "biases": Case(
        sa.softmax(
            sa.causal(),
            bias=sa.pair_bias("p") + sa.key_bias("k") + sa.t5_bias("t"),
        ),
        {"p": (1, HEADS, N, N), "k": (1, HEADS, N), "t": (HEADS, 32)},
    ),
    "joint": Case(
        sa.joint(NEAR, sa.softmax(sa.causal() & sa.sinks(20), logits_soft_cap=2.0))
    ),
    "average": Case(sa.average(NEAR, sa.full())),
    "gated": Case(sa.gated(NEAR, sa.linear()), {"gates": (1, N, HEADS, 2)}),
    "summaries": Case(sa.summaries(sa.spans(8), pool="mean")),
    "Combiner": Case(catalog.combiner_fixed(8)),
    "linear": Case(sa.linear()),
    "linear, decay, documents": Case(
        sa.linear(decay=0.9, map=sa.causal() & sa.segments()), integers=SEGMENTS
    ),
    "linear, full": Case(sa.linear(map=sa.full())),
    "delta": Case(sa.delta(0.8, 0.9)),
    "delta, documents": Case(
        sa.delta(0.8, map=sa.causal() & sa.segments()), integers=SEGMENTS
    ),
    "linear, by channel": Case(sa.linear("identity", normalise="channel")),
    "local linear": Case(
        sa.local_linear(NEAR, "ridge"), {"ridge": (HEADS,)}, kernels=False
    ),
    "channel": Case(sa.channel()),
    "compressed": Case(sa.compressed(8, 4)),
    "scatter mean": Case(sa.scatter_mean(MEMBERS), CENTROIDS, chooses=True),
    "clusters": Case(sa.summaries(sa.clusters(CLUSTERS)), CENTROIDS, chooses=True),
    "topk": Case(
        sa.causal() & (sa.window(4) | topk(2, block=8, eligible=sa.causal())),
        chooses=True,
    ),
}
FEW = ("biases", "dropout", "joint", "linear, decay, documents")


def but_for(few):
    """All cases, slow but for a few."""
    slow = pytest.mark.slow
    return [pytest.param(x, marks=() if x in few else slow) for x in CASES]


MANY = but_for(FEW)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def arrays(case, dtype):
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    floats = (draw(2, N, HEADS, DIM), *(draw(2, N, KV_HEADS, DIM) for _ in "kv"))
    named = {name: draw(*shape) for name, shape in case.floats.items()}
    if "ridge" in named:
        named["ridge"] = jnp.exp(named["ridge"])
    return floats, named, draw(2, N, HEADS, DIM)


def attend(case, impl, floats, named):
    """The output, and the lse if there is one."""
    given = {name: jnp.asarray(x) for name, x in case.integers.items()}
    options = {}
    if case.rate:
        options = {"dropout_rate": case.rate, "dropout_key": jax.random.key(1)}
    call = partial(
        sa.attention, *floats, case.spec, operands=named, impl=impl,
        **given, **BACKENDS[impl], **options,
    )  # fmt: skip
    try:
        return call(return_lse=True)
    except NotImplementedError as error:
        if "return_lse" not in str(error):
            raise
        return (call(),)


def run(case, impl, dtype):
    """The outputs and the gradients of everything that has one."""
    floats, named, do = arrays(case, dtype)

    def loss(floats, named):
        out = attend(case, impl, floats, named)
        # The lse of a query that sees nothing is constant.
        extra = sum(jnp.sum(jnp.where(jnp.isneginf(x), 0, x)) for x in out[1:])
        return jnp.sum(out[0] * do) + extra, out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), gradients = jax.jit(grad)(floats, named)
    return out, gradients


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        scale = max(1.0, float(np.abs(b[finite]).max(initial=0.0)))
        assert (
            float(np.abs(a[finite] - b[finite]).max(initial=0.0)) <= tolerance * scale
        )


def inner(value):
    """The programs in a parameter of an equation."""
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, jax.extend.core.Jaxpr):
        return [value]
    return (
        [x for y in value for x in inner(y)] if isinstance(value, tuple | list) else []
    )


def narrowed(jaxpr):
    """Equations that make float32 of float64, also those within others."""
    found = []
    for equation in jaxpr.eqns:
        kinds = [
            {str(x.aval.dtype) for x in side if hasattr(x.aval, "dtype")}
            for side in (equation.invars, equation.outvars)
        ]
        below = [x for value in equation.params.values() for x in inner(value)]
        array = any(getattr(x.aval, "ndim", 0) for x in equation.outvars)
        if array and "float64" in kinds[0] and "float32" in kinds[1] and not below:
            found.append(str(equation))
        found += [x for program in below for x in narrowed(program)]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", MANY)
def test_both_paths_agree_in_all_digits(name):
    case = CASES[name]
    found, expected = (run(case, impl, "float64") for impl in ("xla", "reference"))
    assert {x.dtype.name for x in jax.tree.leaves((found, expected))} == {"float64"}
    assert_close(found, expected, 1e-12)


@pytest.mark.sample(6)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [x for x in CASES if not CASES[x].chooses])
@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_nothing_is_narrowed_on_the_way(impl, name):
    """Scores of a choice are float32 by contract; no other number is."""
    case = CASES[name]
    floats, named, do = arrays(case, "float64")

    def pulled(floats, named):
        out, pull = jax.vjp(partial(attend, case, impl), floats, named)
        return out, pull((do, *map(jnp.zeros_like, out[1:])))

    program = jax.make_jaxpr(pulled)(floats, named)
    assert not narrowed(program.jaxpr)


@pytest.mark.sample(1)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_softmax_is_that_of_numbers(impl, soft_cap):
    case = Case(sa.softmax(NEAR - sa.queries(10, 20), logits_soft_cap=soft_cap))
    (q, k, v), _, do = arrays(case, "float64")
    pairs = case.spec.map.dense(N)[None].repeat(HEADS, axis=1)
    by_head = [np.swapaxes(np.asarray(x), 1, 2) for x in (q, k, v)]
    expected = oracle.with_gradients(
        *by_head, pairs, DIM**-0.5, soft_cap,
        do=np.swapaxes(np.asarray(do), 1, 2), dlse=np.ones((2, HEADS, N)),
    )  # fmt: skip
    (o, lse), ((dq, dk, dv), _) = run(case, impl, "float64")
    found = (o, dq, dk, dv)
    o, dq, dk, dv = (np.swapaxes(np.asarray(x), 1, 2) for x in found)
    assert_close((o, lse, dq, dk, dv), tuple(expected), 1e-12)


@pytest.mark.parametrize("impl", ["tpu", "triton"])
@pytest.mark.parametrize("name", ["causal", "linear", "Combiner", "channel", "gated"])
def test_kernels_refuse_float64(impl, name):
    floats, named, _ = arrays(CASES[name], "float64")
    with pytest.raises(NotImplementedError, match="not float64: cast, or use impl='x"):
        attend(CASES[name], impl, floats, named)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", but_for(["dropout"]))
@pytest.mark.parametrize("impl", IMPLS)
def test_float32_is_as_without_64_bits(impl, name):
    case = CASES[name]
    if impl in ("tpu", "triton") and not case.kernels:
        pytest.skip("refused, as the tests of the term say")
    found = run(case, impl, "float32")
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
    with jax.enable_x64(False):
        expected = run(case, "reference", "float32")
    assert_close(found, expected, 1e-4)
