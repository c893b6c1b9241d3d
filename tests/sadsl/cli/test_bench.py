"""``sadsl bench``: both sides compute the same, and the figures are those of rounds."""

import pytest

from sadsl.cli import bench as bench_module


def bench(values, spec, *more):
    sizes = "--seq_len", "37", "--heads", "2", "--head_dim", "8", "--rounds", "2"
    return values("bench", spec, *sizes, *more)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_bench_compares_with_the_same_pairs(values):
    # The first query sees no key.
    spec = "where(lambda q, k: k < q) & window(9)"
    found = bench(values, spec, "--kv_heads", "1")
    assert found["baseline"] == "the same pairs as a mask"
    assert found["largest_difference"] < 1e-5
    assert found["rounds"] == 2
    assert [figures["pass"] for figures in found["passes"]] == [
        "forward", "forward and gradient",
    ]  # fmt: skip
    for figures in found["passes"]:
        low, high = figures["lowest_ratio"], figures["highest_ratio"]
        assert 0 < low <= figures["ratio"] <= high
        assert min(figures["ms"].values()) > 0
    assert found["machine"]["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "baseline"),
    [
        ("causal()", "is_causal=True"),
        ("full()", "is_causal=False"),
        ("causal() & segments()", "the same pairs as a mask"),
        ("per_head(causal(), window(3))", "the same pairs as a mask"),
    ],
)
def test_bench_of_specs_that_jax_nn_can_say(spec, baseline, values):
    found = bench(values, spec, "--batch", "2")
    assert found["baseline"] == baseline
    assert found["largest_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["linear()", "softmax(causal(), bias=alibi())"])
def test_bench_of_specs_that_jax_nn_cannot_say(spec, values):
    found = bench(values, spec)
    assert "another function" in found["baseline"]
    assert found["largest_difference"] is None


def test_bench_text_is_aligned():
    figures = {
        "pass": "forward", "ms": {"sadsl": 1.5, "jax.nn": 1234.0}, "ratio": 822.67,
        "lowest_ratio": 1.0, "highest_ratio": 99.0,
        "temporary_bytes": {"sadsl": 0, "jax.nn": 1 << 21},
    }  # fmt: skip
    text = bench_module._text(
        {
            "machine": {"cpu": "A CPU, 2 cores", "devices": ["cpu: cpu"]},
            "jax": "0.10.2", "spec": "causal()", "call": "batch 1", "rounds": 5,
            "baseline": "is_causal=True", "largest_difference": 1e-6,
            "passes": [figures],
        }
    )  # fmt: skip
    assert text.splitlines()[-2:] == [
        "           sadsl       jax.nn    faster          range  sadsl MiB  jax.nn MiB",
        "forward  1.50 ms  1,234.00 ms  822.67 x  1.00 to 99.00        0.0         2.0",
    ]
