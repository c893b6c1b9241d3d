"""Reports as text, dict and HTML; the hot loops of a CPU's program."""

import json
from html.parser import HTMLParser

import pytest

from lowering.targets import chips, cpu, figures, tpu
from lowering.targets.report import KernelFigures, LoopFigures, Report

LOOPS = (
    LoopFigures("full tile", 1, 2, {"bundles": 1200, "share of peak": 0.5}),
    LoopFigures("partial tile", 3, 3, {"bundles": 7}),
)
KERNEL = KernelFigures(
    "forward", {"VMEM": 4096, "SASS": {"HMMA": 3}}, LOOPS, "a\nb\nc\nd\ne"
)
REPORT = Report("tpu-v6e", {"temporaries (bytes)": 12345}, (KERNEL,), ("a < b",))


def test_as_text():
    assert str(REPORT) == (
        "target               tpu-v6e\n"
        "temporaries (bytes)  12,345\n\n"
        "kernels\n"
        "          VMEM    SASS\n"
        "forward  4,096  HMMA 3\n\n"
        "loops with products\n"
        "                       bundles  share of peak\n"
        "forward, full tile       1,200          50.0%\n"
        "forward, partial tile        7              -\n\n"
        "note: a < b"
    )


def test_as_a_dict():
    found = json.loads(json.dumps(REPORT.as_dict()))
    assert found["temporaries (bytes)"] == 12345
    (kernel,) = found["kernels"]
    assert (kernel["name"], kernel["VMEM"]) == ("forward", 4096)
    assert kernel["loops"][0] == {
        "name": "full tile",
        "bundles": 1200,
        "share of peak": 0.5,
    }


def test_as_html():
    cells = []

    class Cells(HTMLParser):
        def handle_data(self, data):
            cells.append(data)

    Cells().feed(REPORT._repr_html_())
    assert {"tpu-v6e", "forward, full tile", "50.0%", "a < b"} <= set(cells)


def test_marked_code():
    assert KERNEL.marked() == (
        "-- forward\n"
        "              | a\n"
        "full tile     | b\n"
        "full tile     | c\n"
        "partial tile  | d\n"
        "              | e"
    )
    assert KERNEL.marked(hot=True).count("\n") == 3


@pytest.mark.parametrize(
    ("count", "tiled", "names"),
    [
        (1, True, ["loop 1"]),
        (2, True, ["full tile", "partial tile"]),
        (4, True, ["full tile", "partial tile", "repeat", "loop 4"]),
        (2, False, ["loop 1", "loop 2"]),
    ],
)
def test_names_of_loops(count, tiled, names):
    assert figures.loop_names(count, tiled) == names


def test_the_share_of_the_peak():
    span = tpu.Span(0, 99, 10, 0)
    code = "".join(f"  {hex(at)}   : > {{ %1 = add }}\n" for at in range(100))
    kernel = tpu.TpuKernel(
        name="sadsl_forward.1", code=code, loops=(span, span), regions=(), bundles=100,
        matrix_ops=20, spills=0, vmem=8, smem=4, busy=tpu.UnitSlots(),
    )  # fmt: skip
    chip = chips.find("tpu-v5e")
    tile = {"forward": 25 * chip.flops_per_cycle}
    (found,) = figures.of_tpu((kernel,), chip, tile)
    assert [x.figures["share of peak"] for x in found.loops] == [0.25, 0.25]
    (other,) = figures.of_tpu((kernel,), chip, {"dq": 1.0})
    assert [loop.name for loop in other.loops] == ["loop 1", "loop 2"]
    assert "share of peak" not in other.loops[0].figures


HLO = """HloModule jit_f

%product (a: f32[8], b: f32[8]) -> f32[8] {
  ROOT %dot.1 = f32[8] dot(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8] fusion(%p), kind=kCustom, calls=%product
  ROOT %wrapped = f32[8] fusion(%p), kind=kLoop, calls=%plain
}

%test (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%p, %p)
}

%plain (a: f32[8]) -> f32[8] {
  ROOT %add = f32[8] add(%a, %a)
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %fusion.3 = f32[8] fusion(%q), kind=kCustom, calls=%product
  ROOT %while.1 = (s32[], f32[8]) while(%q), condition=%test, body=%body
}
"""


def test_hot_loops_of_a_cpu():
    (loop,) = cpu.hot_loops(HLO)
    assert (loop.name, loop.products) == ("body", 1)
    assert loop.fusions == ("fusion.1", "wrapped")
    assert HLO.splitlines()[loop.first].startswith("%body")
    assert HLO.splitlines()[loop.last] == "}"


def test_a_program_without_loops():
    straight = HLO.replace("while(%q), condition=%test, body=%body", "copy(%q)")
    (loop,) = cpu.hot_loops(straight)
    assert (loop.name, loop.products) == ("main", 1)
    assert cpu.hot_loops("HloModule empty") == ()
