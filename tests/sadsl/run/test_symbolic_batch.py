"""``jax.export`` with a symbolic batch: one program for every batch size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from content_cases import CASES
from flax import nnx
from jax import export

import sadsl as sa
from sadsl.layers.nnx import SparseAttention
from sadsl.terms.regions import spans

# Compiled in a hurry: nothing here is about speed.
pytestmark = pytest.mark.usefixtures("quick")

slow = pytest.mark.slow
NEAR = sa.causal() & sa.window(5)
BATCH, SEQ, HEADS, DIM = 3, 24, 2, 8
IDS = np.sort(np.random.default_rng(0).integers(0, 4, (BATCH, SEQ)), axis=1)
KEY = jax.random.key_data(jax.random.key(7))


def exported(f, *args):
    """``f`` written and read again; what starts with the batch has a symbolic one."""
    (batch,) = export.symbolic_shape("batch")

    def struct(x):
        lead = (batch,) if x.ndim and x.shape[0] == BATCH else x.shape[:1]
        return jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype)

    found = export.export(jax.jit(f))(*jax.tree.map(struct, args))
    return export.deserialize(found.serialize()).call


def first_entries(count, x):
    return x[:count] if x.ndim and x.shape[0] == BATCH else x


def check(f, *args):
    """One program at two batch sizes gives what the direct calls give."""
    args = jax.tree.map(np.asarray, args)
    call = exported(f, *args)
    for size in (1, BATCH):
        own = jax.tree.map(partial(first_entries, size), args)
        found, want = (jax.tree.leaves(g(*own)) for g in (call, f))
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def arrays(seq=SEQ, heads=HEADS, dim=DIM):
    rng = np.random.default_rng(1)
    shape = BATCH, seq, heads, dim
    return [rng.normal(size=shape).astype(np.float32) for _ in "qkv"]


def check_spec(spec, operands=None, *, impl="xla", grad=False, qkv=None, **given):
    def f(q, k, v, operands, given):
        run = lambda *x: sa.attention(
            *x, spec, operands=operands, impl=impl, interpret=impl != "xla", **given
        )
        if not grad:
            return run(q, k, v)
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(out)

    check(f, *(qkv or arrays()), operands or {}, given)


DOCUMENTS = {"q_segment_ids": IDS, "kv_segment_ids": IDS}
FLOATS = np.random.default_rng(2).normal(size=(BATCH, SEQ, HEADS)).astype(np.float32)

# A spec, its operands and the other arrays of its call.
SPECS = {
    "map": (NEAR, {}, {}),
    "segments": (sa.causal() & sa.segments(), {}, DOCUMENTS),
    "operand": (
        sa.where(lambda q, k: k < sa.operand("n")),
        {"n": np.array([2, 9, 24])},
        {},
    ),
    "pairs": (
        sa.where(lambda q, k: sa.operand("m")[q // 8, k // 8] == 1),
        {"m": np.arange(27).reshape(BATCH, 3, 3) % 2},
        {},
    ),
    "sinks": (sa.softmax(NEAR, sink="s"), {"s": FLOATS[:, 0]}, {}),
    "bias": (
        sa.softmax(NEAR, bias=sa.key_bias("b")),
        {"b": FLOATS.swapaxes(1, 2)},
        {},
    ),
    "average": (sa.average(NEAR, sa.causal() & sa.segments()), {}, DOCUMENTS),
    "joint": (sa.joint(NEAR, sa.linear(), overlap="count"), {}, {}),
    "linear": (sa.linear(map=sa.causal() & sa.segments()), {}, DOCUMENTS),
    "decay": (sa.linear(decay="g"), {"g": -np.abs(FLOATS)}, {}),
    "summaries": (sa.summaries(spans(8)), {}, {}),
    "channel": (sa.channel(), {}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segments", "pairs", "joint", "summaries"])
def test_specs(name):
    spec, operands, given = SPECS[name]
    check_spec(spec, operands, **given)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name, grad):
    spec, operands, given = SPECS[name]
    check_spec(spec, operands, grad=grad, **given)


def check_choice(name, impl="xla"):
    case = CASES[name]
    qkv = arrays(case.n, case.num_heads, case.head_dim)
    check_spec(case.spec, dict(case.operands(*qkv[:2])), impl=impl, qkv=qkv)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsh signs", "kmeans", "moba"])
def test_choices(name):
    check_choice(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_choice(name):
    check_choice(name)


@pytest.mark.slow
def test_what_is_selected():
    spec = CASES["moba"].spec
    check(lambda q, k: sa.select(spec, q, k), *arrays(48)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["tpu", "triton"])
@pytest.mark.parametrize(
    "name", ["segments", *(pytest.param(n, marks=slow) for n in ("map", "linear"))]
)
def test_kernels(name, impl):
    """Pallas compiles no kernel of unknown size: entries come one after the other."""
    spec, operands, given = SPECS[name]
    check_spec(spec, operands, impl=impl, **given)


@pytest.mark.parametrize("impl", ["tpu", "triton"])
def test_lowering_of_kernels(impl):
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 128, 2, 128), jnp.bfloat16)
    f = lambda q, k, v: sa.attention(q, k, v, sa.causal(), impl=impl)
    platform = {"tpu": "tpu", "triton": "cuda"}[impl]
    # The calls of both kernels are custom calls that export does not know to be stable.
    allowed = export.DisabledSafetyCheck.custom_call
    checks = [allowed(x) for x in ("triton_kernel_call", "__gpu$xla.gpu.triton")]
    found = export.export(jax.jit(f), platforms=[platform], disabled_checks=checks)
    text = found(x, x, x).mlir_module()
    assert "custom_call" in text
    assert "stablehlo.while" in text


@pytest.mark.parametrize("name", ["map", pytest.param("segments", marks=slow)])
def test_dropout_drops_what_direct_calls_drop(name):
    spec, _, given = SPECS[name]

    def f(q, k, v, key, given):
        key = jax.random.wrap_key_data(key)
        return sa.attention(
            q, k, v, spec, dropout_rate=0.4, dropout_key=key, impl="xla", **given
        )

    check(f, *arrays(), KEY, given)


@pytest.mark.slow
def test_a_layer():
    layer = SparseAttention(
        spec="causal() & segments()", num_heads=2, in_features=8, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    x = np.random.default_rng(0).normal(size=(BATCH, SEQ, 8)).astype(np.float32)

    def f(state, x, ids):
        given = dict.fromkeys(DOCUMENTS, ids)
        return nnx.merge(graph, state)(x, **given)

    check(f, nnx.to_pure_dict(state), x, IDS)


def test_a_symbolic_length_is_refused():
    (length,) = export.symbolic_shape("length")
    x = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32)
    f = lambda q, k, v: sa.attention(q, k, v, NEAR)
    with pytest.raises(ValueError, match=r"\(2, length, 2, 8\): only the batch may be"):
        export.export(jax.jit(f))(x, x, x)
