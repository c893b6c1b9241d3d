"""The counts of ``explain`` against dense masks, as text and as HTML."""

from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import few

import sadsl as sa
from lowering.cost import rooflines
from lowering.targets.chips import TARGETS
from sadsl.analysis import explain

WINDOW = "causal() & window(100)"
BLOCKS = sa.KernelConfig(block_q=64, block_kv=64)


def lowered(spec=WINDOW, n=512, heads=(4, 2), dtype=jnp.bfloat16, **options):
    q, k, v = (
        jax.ShapeDtypeStruct((3, n, heads[i > 0], (64, 64, 32)[i]), dtype)
        for i in range(3)
    )
    return sa.lower(spec, q, k, v, **options)


def facts(of):
    return dict(of.facts)


def cells(of, title):
    """A table as ``{row: {column: cell}}``."""
    (table,) = [t for t in of.tables if t.title.startswith(title)]
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def number(text):
    return int(text.replace(",", ""))


def test_counts_are_what_the_dense_mask_holds():
    of = lowered(target="tpu-v6e", config=BLOCKS).explain()
    dense = sa.parse(WINDOW).dense(512)[0]
    tiles = dense.reshape(8, 64, 8, 64)
    visited, full = tiles.any(axis=(1, 3)).sum(), tiles.all(axis=(1, 3)).sum()
    pairs, area = 4 * dense.sum(), 4 * 512 * 512
    share = f"{pairs / area:.2%}"
    assert facts(of)["pairs"] == f"{pairs:,} of {area:,} over all heads ({share})"
    waste = 1 - dense.sum() / (visited * 64 * 64)
    assert facts(of)["padding waste"].startswith(f"{waste:.1%} of the pairs")
    forward = cells(of, "kernels")["forward"]
    assert forward["block"] == "64 x 64"
    counts = [number(forward[x]) for x in ("full", "partial", "padded", "empty")]
    assert counts == [12 * full, 12 * (visited - full), 0, 12 * (64 - visited)]
    assert number(forward["FLOPs"]) == 2 * 12 * visited * 64 * 64 * (64 + 32)
    side = cells(of, "beside dense")
    assert number(side["FLOPs forward"]["this call"]) == number(forward["FLOPs"])
    assert number(side["FLOPs forward"]["dense"]) == 2 * 12 * 512 * 512 * (64 + 32)
    causal = np.tril(np.ones((8, 8))).sum()
    found = number(side["FLOPs forward"]["dense causal"])
    assert found == 2 * 12 * causal * 64 * 64 * (64 + 32)


def test_ratios_are_of_times_where_they_are_known():
    of = lowered(target="h100", config=BLOCKS).explain()
    side = cells(of, "beside dense attention (ratios are of predicted times on h100)")
    assert side["ratio forward"]["this call"] == "1.00 x"
    columns = explain.compared(lowered(target="h100", config=BLOCKS).part)
    for name in ("dense", "dense causal"):
        times = [rooflines.predict(columns[x], "h100") for x in (name, "this call")]
        expected = f"{times[0].seconds / times[1].seconds:.2f} x"
        assert side["ratio forward"][name] == expected
    assert "us (" in side["time backward"]["dense"]


def test_a_cpu_has_ratios_of_flops_and_no_time():
    of = lowered(target="cpu", config=BLOCKS).explain()
    side = cells(of, "beside dense attention (ratios are of FLOPs)")
    assert "time forward" not in side
    ratio = number(side["FLOPs forward"]["dense"]) / of.cost.flops()
    assert side["ratio forward"]["dense"] == f"{ratio:.2f} x"
    kernels = cells(of, "kernels")
    assert list(kernels) == ["forward", "backward", "delta"]
    assert number(kernels["forward"]["padded"]) == of.cost.forward.num_padded > 0


@pytest.mark.parametrize("target", ["cpu", "tpu-v5e", "b200"])
def test_every_chip_has_a_line(target):
    """A chip of the same platform runs this call; another, its own kernels."""
    of = lowered(target=target, config=BLOCKS).explain()
    chips = cells(of, "predicted times")
    assert [name.removesuffix(" *") for name in chips] == list(TARGETS)
    assert [name for name in chips if name.endswith("*")] == (
        [f"{target} *"] if target in TARGETS else []
    )
    side = cells(of, "beside dense")
    for name in TARGETS:
        direct = lowered(
            target=name, config=BLOCKS if TARGETS[name] == TARGETS.get(target) else None
        )
        line = chips.get(name) or chips[f"{name} *"]
        assert line["impl"] == direct.options.setting.impl
        if name == target:
            assert line["forward"] == side["time forward"]["this call"]
        elif target == "cpu":
            other = cells(direct.explain(), "beside dense")
            assert line["forward"] == other["time forward"]["this call"]


def test_heads_with_their_own_maps_have_their_own_lines():
    of = lowered("per_head(causal(), full())", target="tpu-v5p").explain()
    maps = cells(of, "blocks of the distinct maps")
    assert [maps[m]["pairs"] for m in "01"] == ["131,328", "262,144"]
    assert [maps[m]["heads"] for m in "01"] == ["2", "2"]
    assert facts(of)["heads, distinct maps"] == "4, 2"
    pairs = number(facts(of)["pairs"].split()[0])
    assert pairs == 2 * 131_328 + 2 * 262_144


def test_run_time_operands_leave_the_pairs_open():
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    segments = {"q_segment_ids": ids, "kv_segment_ids": ids}
    spec = "per_head(causal() & segments(), causal())"
    of = lowered(spec, target="cpu", operands=segments).explain()
    assert facts(of)["pairs"].startswith("decided at run time by kv_segment_ids")
    assert "padding waste" not in facts(of)
    assert cells(of, "blocks of the distinct maps")["0"]["pairs"] == ""


def test_another_order_is_shown_beside_the_given_one():
    spec, config = "strided(16)", sa.KernelConfig(block_q=128, block_kv=128)
    of = lowered(spec, n=2048, target="h200", config=config).explain()
    side = cells(of, "beside dense")
    flops = {name: number(x) for name, x in list(side["FLOPs forward"].items())[1:]}
    assert flops["in given order"] == flops["dense"] == 16 * flops["this call"]
    moved = 2 * 3 * 2048 * (2 * (4 + 2) * (64 + 32) + 4 * 4)
    assert number(side["permutation bytes"]["this call"]) == moved
    assert number(side["permutation bytes"]["in given order"]) == 0
    assert "order of queries" in facts(of)
    kept = sa.KernelConfig(block_q=128, block_kv=128, relayout=False)
    given = lowered(spec, n=2048, target="h200", config=kept).explain()
    assert "order of queries" not in facts(given)
    assert given.cost.flops() == flops["in given order"]
    assert number(facts(given)["pairs"].split()[0]) == 4 * 2048 * 128
    assert facts(given)["pairs"] == facts(of)["pairs"]


def test_float16_is_widened_on_a_tpu():
    half, single = (
        lowered(target="tpu-v5e", dtype=x, config=BLOCKS).explain().cost
        for x in (jnp.float16, jnp.float32)
    )
    assert half.forward == single.forward
    assert half.exact_products


def test_an_empty_map_has_no_ratio():
    of = lowered("full() - full()", target="cpu").explain()
    assert facts(of)["pairs"].startswith("0 of ")
    assert facts(of)["padding waste"].startswith("0.0%")
    assert cells(of, "beside dense")["ratio forward"]["dense"] == "-"


def test_text_is_aligned():
    text = str(lowered(target="tpu-v6e").explain())
    assert text == repr(lowered(target="tpu-v6e").explain())
    first, *tables = text.split("\n\n")
    assert all(line[20:22] == "  " and line[22] != " " for line in first.splitlines())
    for table in tables:
        _, header, *rows = table.splitlines()
        # Numbers stand on the right.
        assert len({len(row) for row in (header, *rows)}) == 1
    assert not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (1e-8, "10 ns"),
     (0.0, "0 ns")],
)  # fmt: skip
def test_times_have_a_fitting_unit(seconds, text):
    assert explain._time(rooflines.Time(seconds, "bytes")) == f"{text} (bytes)"


class Cells(HTMLParser):
    """The texts of all cells; fails where tags are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.found, self.tables = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tables += tag == "table"
        if tag in ("td", "th"):
            self.found.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.found[-1] += data


def test_html_holds_the_same_cells():
    of = lowered("where(lambda q, k: (k <= q) & (q - k < 9))", target="h100").explain()
    html = of._repr_html_()
    reader = Cells()
    reader.feed(html)
    assert not reader.open
    assert reader.tables == 1 + len(of.tables)
    expected = [x for fact in of.facts for x in fact]
    for table in of.tables:
        expected += [x for line in (table.header, *table.rows) for x in line]
    assert reader.found == expected
    # A spec is text, not markup, and no colour is set for light or dark pages.
    assert "k &lt;= q" in html
    assert "&amp; (q" in html
    assert "#" not in html
    assert "<script" not in html


@settings(max_examples=few(25))
@given(strategies.with_heads(), strategies.SIZES, st.sampled_from(["cpu", "a100"]))
def test_any_map_is_explained(spec, n, target):
    of = lowered(spec, n=n, heads=(6, 3), target=target).explain()
    dense = spec.dense(n, num_heads=6).sum()
    assert facts(of)["pairs"].startswith(f"{dense:,} of {6 * n * n:,} over")
