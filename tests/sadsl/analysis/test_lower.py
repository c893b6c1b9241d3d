"""Lowering for absent chips, ``explain``, pictures, and the printed stages."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

import sadsl as sa
from lowering import pipeline
from sadsl import plot

mpl.use("Agg")
GOLDEN = Path(__file__).parents[2] / "golden"


def shapes(n=1024, heads=4, kv_heads=2, dim=64, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((1, n, heads, dim), dtype)
    k = jax.ShapeDtypeStruct((1, n, kv_heads, dim), dtype)
    return q, k, k


SPEC = "causal() & (window(256) | sinks(16))"
STAGES = {
    "window_and_sinks": SPEC,
    "dilated": "causal() & dilated(7, 0, 3)",
    "blocks_lifted": "(causal() & window(1)).lift(64) | blocks(16)",
    "heads": "per_head(causal() & window(64), causal() & window(128), strided(4))",
    "segments": "causal() & (segments() | where(lambda q, k: k < operand('prefix')))",
    "traced": "where(lambda q, k, h: (2 * q + 6 - 2 * k) // 4 <= h + 1) - keys(3, 9)",
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_read_as_before(name):
    """A diff here shows what a change of a pass does; delete a file to renew it."""
    spec = sa.parse(STAGES[name])
    stages = pipeline.run(spec.node, pipeline.Problem(512, 512, 6, q_offset=0))
    plan = sa.plan(spec, 512, block_q=64, block_kv=64, num_heads=6)
    text = f"{spec!r}\n\n{stages}\n\n-- plan\n{plan}\n"
    path = GOLDEN / f"{name}.txt"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"wrote {path.name}: look at it, then run again")
    assert text == path.read_text()


def test_every_stage_is_printed():
    text = str(sa.lower(SPEC, *shapes()))
    order = ["-- spec", "-- input", "-- resolve_heads", "-- simplify", "-- hoist",
             "-- plan", "-- kernel", "-- jaxpr"]  # fmt: skip
    places = [text.index(title) for title in order]
    assert places == sorted(places)


def test_cpu():
    low = sa.lower(SPEC, *shapes(), target="cpu")
    compiled = low.compile()
    assert "HloModule" in compiled.asm()
    assert compiled.memory()["temporaries"] > 0
    assert "temporaries" in str(compiled.report())
    assert "stablehlo" in low.module


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e", "tpu7x"])
@pytest.mark.parametrize("gradient", [False, True])
def test_tpus(target, gradient):
    low = sa.lower(SPEC, *shapes(), target=target, gradient=gradient)
    assert "tpu_custom_call" in low.module
    assert "pallas_call" in low.jaxpr
    compiled = low.compile()
    assert compiled.memory()["code"] > 0
    assert "custom-call" in compiled.asm()


@pytest.mark.sample(1)
@pytest.mark.parametrize("target", ["a100", "h100", "h200", "b200"])
@pytest.mark.parametrize("gradient", [False, True])
def test_gpus(target, gradient):
    low = sa.lower(SPEC, *shapes(), target=target, gradient=gradient)
    assert low.module.count("tt.func") == (3 if gradient else 1)
    assert "tt.dot" in low.compile().asm()
    assert "Triton IR" in str(low.compile().report())


def test_run_time_operands_are_lowered_by_shape():
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    low = sa.lower(
        "causal() & segments()",
        *shapes(),
        target="h200",
        operands={"q_segment_ids": ids, "kv_segment_ids": ids},
    )
    assert "tt.func" in low.module
    text = str(low.explain())
    assert "decided at run time by kv_segment_ids, q_segment_ids" in text
    with pytest.raises(ValueError, match="'kv_segment_ids', which was not given"):
        sa.lower("segments()", *shapes(), operands={"q_segment_ids": ids})


def test_bad_targets():
    with pytest.raises(ValueError, match="target='tpu-v9': must be None or one of cpu"):
        sa.lower(SPEC, *shapes(), target="tpu-v9")
    with pytest.raises(ValueError, match="impl='cuda': must be None or one of"):
        sa.lower(SPEC, *shapes(), impl="cuda")


@pytest.mark.parametrize(
    ("impl", "target", "message"),
    [
        ("reference", "cpu", "impl='reference' has no kernel to lower"),
        ("tpu", "cpu", "impl='tpu' runs on tpu, not on target='cpu'"),
        ("triton", "tpu-v6e", "impl='triton' runs on gpu, not on target='tpu-v6e'"),
    ],
)
def test_an_impl_that_the_target_cannot_run(impl, target, message):
    with pytest.raises(ValueError, match=message):
        sa.lower(SPEC, *shapes(), impl=impl, target=target)


def test_pictures():
    ax = plot.pattern("causal() & window(3)", 12)
    drawn = np.asarray(ax.images[0].get_array())
    np.testing.assert_array_equal(drawn, sa.parse("causal() & window(3)").dense(12)[0])
    plan = sa.plan("causal()", 64, block_q=16, block_kv=16)
    kinds = np.asarray(plot.blocks(plan).images[0].get_array())
    np.testing.assert_array_equal(kinds, np.tril(np.full((4, 4), 2)) - np.eye(4))
    large = plot.blocks(sa.plan("causal()", 1 << 20, block_q=128, block_kv=128))
    assert np.asarray(large.images[0].get_array()).shape == (1024, 1024)
    mpl.pyplot.close("all")


@pytest.mark.slow
def test_the_core_does_not_import_extras():
    import subprocess
    import sys

    code = (
        "import sys, sadsl;"
        "found = {'flax', 'matplotlib', 'rich', 'optax', 'orbax'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
