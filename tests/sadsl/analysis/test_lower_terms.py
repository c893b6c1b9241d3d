"""Every kind of term is lowered, explained and reported, for every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl import catalog
from sadsl.run.observed import softmax_calls

N, HEADS, DIM = 64, 4, 8
NEAR = sa.causal() & sa.window(9)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


IDS = jax.ShapeDtypeStruct((1, N), jnp.int32)
SEGMENTS = {"q_segment_ids": IDS, "kv_segment_ids": IDS}
# Of each term: its spec, its operands, and how many softmaxes it has.
TERMS = {
    "map": ("causal()", {}, 1),
    "sink": (sa.softmax(NEAR, sink="s"), {"s": floats(HEADS)}, 1),
    "scale": (
        sa.softmax(NEAR, scale=sa.bias(lambda q, k, h: sa.weights("t")[h])),
        {"t": floats(HEADS)},
        1,
    ),
    "segments": (sa.causal() & sa.segments(), SEGMENTS, 1),
    "selection": (sa.causal() & sa.topk(2, block=16), {}, 1),
    "token-level selection": (sa.causal() & sa.topk(16, block=1), {}, 1),
    "joint": (sa.joint(sa.softmax(NEAR, bias=sa.alibi()), sa.causal()), {}, 2),
    "average": (sa.average(NEAR, sa.full()), {}, 2),
    "gated": (sa.gated(NEAR, sa.linear()), {"gates": floats(1, N, HEADS, 2)}, 1),
    "heads": (sa.heads((NEAR, 2), (sa.causal() & sa.strided(4), 2)), {}, 2),
    "summaries": (sa.summaries(sa.spans(8), pool="mean"), {}, 2),
    "Combiner": (catalog.combiner_fixed(8), {}, 3),
    "compressed": (sa.compressed(8, 4), {}, 1),
    "over": (
        sa.over("entries", sa.full()),
        {"entries": floats(1, 16, HEADS, DIM)},
        1,
    ),
    "linear": (sa.linear(decay=0.9), {}, 0),
    "delta": (sa.delta(0.8, 0.9), {}, 0),
    "channel": (sa.channel(), {}, 0),
    "scatter mean": (
        sa.scatter_mean(sa.kmeans(3, 20) & sa.causal()),
        {"centroids": floats(HEADS, 3, DIM)},
        0,
    ),
}
LOCAL = sa.local_linear(NEAR, "ridge"), {"ridge": floats(HEADS)}
SHAPES = (floats(1, N, HEADS, DIM),) * 3
WHOLE = ["joint", "gated", "summaries", "over", "linear", "delta", "channel"]


def lowered(name, target, **options):
    spec, operands, _ = TERMS[name]
    return sa.lower(spec, *SHAPES, target=target, operands=operands, **options)


@pytest.mark.sample(18)
@pytest.mark.parametrize("target", ["cpu", "tpu-v6e", "h100"])
@pytest.mark.parametrize("name", TERMS)
def test_every_term_has_its_parts_and_is_explained(name, target):
    low = lowered(name, target)
    assert len(low.parts) == TERMS[name][2]
    text = str(low.explain())
    if len(low.parts) == 1:
        assert low.plan.num_heads == HEADS
        assert "beside dense attention" in text
    else:
        assert f"softmax parts         {len(low.parts)}" in text
        assert ("no softmax over pairs" in text) == (not low.parts)


@pytest.mark.sample(3)
@pytest.mark.parametrize("target", ["cpu", "tpu-v6e", "h100"])
@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_lowered_with_its_kernels(name, target):
    low = lowered(name, target)
    module = low.module
    if name != "channel":  # which XLA computes on every platform
        mark = {"cpu": "stablehlo.dot_general", "tpu-v6e": "tpu_custom_call"}
        assert mark.get(target, "tt.func") in module
    assert "stablehlo" in module or target == "h100"


def test_local_linear_has_a_path_on_every_platform():
    spec, operands = LOCAL
    with pytest.raises(NotImplementedError, match="pass impl='xla'"):
        sa.lower(spec, *SHAPES, target="h100", operands=operands)
    low = sa.lower(spec, *SHAPES, target="h100", operands=operands, impl="xla")
    assert "no softmax over pairs" in str(low.explain())


@pytest.mark.parametrize("target", ["tpu-v6e", "h100"])
def test_latents(target):
    q, rows = floats(1, N, HEADS, DIM + 4), floats(1, N, 1, 16 + 4)
    given = {"kv_b": floats(HEADS, DIM + DIM, 16)}
    spec = sa.latent(NEAR)
    low = sa.lower(spec, q, rows, rows, target=target, operands=given)
    assert low.plan.num_heads == HEADS
    assert {"tpu-v6e": "tpu_custom_call"}.get(target, "tt.func") in low.module


def test_choices_by_lists():
    spec = sa.causal() & sa.topk(2, block=16)
    config = sa.KernelConfig(lists=True)
    low = sa.lower(spec, *SHAPES, target="h100", config=config)
    assert "by lists" in str(low.explain())
    assert "tt.func" in low.module


def test_what_a_term_with_several_parts_has_not():
    low = lowered("average", "tpu-v6e")
    with pytest.raises(NotImplementedError, match="ask one of its 2 parts"):
        low.plan  # noqa: B018
    with pytest.raises(NotImplementedError, match="2 softmax parts: take costs"):
        low.explain().cost  # noqa: B018
    assert [cost.flops() > 0 for cost in low.explain().costs] == [True, True]
    with pytest.raises(NotImplementedError, match=r"report\(\) shows its code"):
        lowered("linear", "tpu-v6e").stages  # noqa: B018
    text = str(low)
    assert (
        text.index("part 1 of 2") < text.index("part 2 of 2") < text.index("-- jaxpr")
    )


def test_parts_are_what_attention_runs():
    """Each part is planned for the arrays that its kernels get."""
    near, other = lowered("heads", "cpu").parts
    assert [x.shape for x in near.arguments] == [(1, N, 2, DIM)] * 3
    assert near.options.term.map == NEAR
    dense = other.options.term.map.dense(N)[0]
    assert other.plan.num_pairs == dense.sum()


def test_looking_at_a_call_changes_no_call():
    """Zeros stand for the results of what is observed; none may reach a real call."""
    x = jax.random.normal(jax.random.key(0), (1, N, HEADS, DIM))
    spec = sa.average(NEAR, sa.joint(sa.full(), sa.softmax(NEAR, sink="s")))
    given = {"s": jnp.zeros(HEADS)}

    @jax.jit
    def run(x, given):
        return sa.attention(x, x, x, spec, operands=given)

    assert len(softmax_calls(run, x, given)) == 2
    found = run(x, given)
    expected = sa.attention(x, x, x, spec, operands=given, impl="reference")
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
def test_gradients_of_terms_without_an_lse():
    low = lowered("average", "cpu", gradient=True)
    x = jax.random.normal(jax.random.key(1), (1, N, HEADS, DIM))
    found = low.run(x, x, x, {})

    def total(q, k, v):
        return sa.attention(q, k, v, TERMS["average"][0], impl="reference").sum()

    for mine, other in zip(found, jax.grad(total, (0, 1, 2))(x, x, x), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4)


def test_operands_of_the_wrong_shape_are_refused_at_once():
    with pytest.raises(ValueError, match="must have shape"):
        sa.lower(TERMS["sink"][0], *SHAPES, operands={"s": floats(HEADS + 1)})
    with pytest.raises(ValueError, match="no part of"):
        sa.lower(sa.average(NEAR, sa.full()), *SHAPES, operands={"s": floats(HEADS)})


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", WHOLE)
def test_reports_of_a_cpu(name):
    report = lowered(name, "cpu").compile().report()
    assert report.as_dict()["temporaries (bytes)"] >= 0
    assert ", hot loop 1" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_reports_of_a_tpu(name):
    report = lowered(name, "tpu-v6e").compile().report()
    assert report.kernels
    assert all(x.figures["bundles"] > 0 for x in report.kernels)
    assert any("loop" in x.name or "tile" in x.name
               for kernel in report.kernels for x in kernel.loops)  # fmt: skip
