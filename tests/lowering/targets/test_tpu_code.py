"""Reading scheduled TPU code, on code of which every count is known."""

from lowering.targets import tpu

MATMUL = "%v1_v2 = vmatmul.mubr.bf16.gmra.mxu0 %v3_v4"
PUSH = "%9 = vmatpush.msra.mxu0 %v3_v4"
SPILL = "%5 = vst [vmem:[#allocation83_spill] sm:$0xff] %v1_v2"
ADD = "%s1 = sadd.s32 1, %s2"


def kernel_text(rows):
    """The text of bundles, given as (mark, nesting, instructions)."""
    head = "= control target key start\nLB: loop body\n= control target key end\n\n"
    lines = [
        f" {hex(at) if at else '0':>6} {mark:>2}: {'>' * depth} {{ {code} }}"
        if code
        else f" {hex(at):>6}   :  {{}} /* End region 3 */"
        for at, (mark, depth, code) in enumerate(rows)
    ]
    return head + "\n".join(lines) + "\n"


def test_loops_of_tiles():
    # A loop over full tiles: five bundles, one of which only waits.
    whole = [
        ("LB", 2, PUSH),
        ("", 2, MATMUL),
        ("", 2, SPILL),
        ("", 0, ""),
        ("", 2, ADD),
    ]
    tested = [("LB", 2, MATMUL), ("", 2, f"{MATMUL}  ;;  {SPILL}"), ("", 2, MATMUL)]
    # A copy of rows, deeper than the products.
    copy = [("LB", 2, ADD), ("LB", 3, ADD), ("PF", 1, ADD), ("", 0, ADD)]
    start, between = [("", 0, ADD), ("LB", 1, ADD)], [("PF", 1, ADD)]
    code = kernel_text([*start, *whole, *between, *tested, *between, *copy])
    full, partial = tpu.loops(code)
    assert (full.first, full.bundles, full.matrix_ops, full.spills) == (2, 5, 2, 1)
    assert (partial.bundles, partial.matrix_ops, partial.spills) == (3, 3, 1)
    assert tpu.spills(code) == 2


def test_bundles_with_comments_over_several_lines():
    comment = "%1 = shalt.err (!%p2) /* BoundsCheck\nhlo: sadsl_forward.1\n */"
    code = kernel_text([("", 0, ADD), ("LB", 1, comment), ("", 1, MATMUL)])
    assert len(tpu.bundle_lines(code)) == 3
    assert [x.bundles for x in tpu.loops(code)] == [2]


def test_a_grid_loop_that_copies_inside():
    """The walk holds a loop without products; the walk is what counts."""
    code = kernel_text(
        [("LB", 1, MATMUL), ("LB", 2, ADD), ("", 2, ADD), ("PF", 1, MATMUL)]
    )
    assert [x.bundles for x in tpu.loops(code)] == [4]


def test_a_kernel_without_a_loop():
    code = kernel_text([("", 0, PUSH), ("", 0, MATMUL)])
    (whole,) = tpu.loops(code)
    assert (whole.first, whole.last) == (0, 1)
    assert tpu.loops(kernel_text([("", 0, ADD)])) == ()


def test_regions_of_products():
    """Gaps of 60 bundles join, wider ones part; short stretches are no regions."""
    row, gap = ("", 1, MATMUL), ("", 1, ADD)
    joined = [row] * 80 + [gap] * (tpu.GAP - 1) + [row] * 30
    code = kernel_text(joined + [gap] * tpu.GAP + [row] * 20)
    (region,) = tpu.regions(code)
    assert (region.bundles, region.matrix_ops) == (len(joined), 110)


def test_allocations():
    text = """
      #allocation3 [shape = 'f32[8]', space=vmem, size = 0x100, offset = 0x40, scoped]
      #allocation4 [shape = 'f32[8]', space=vmem, size = 0x10, offset = 0, scoped]
      #allocation5 [shape = 'u32[]', space=smem, size = 4, offset = 8, fixed_abs]
    """
    assert tpu.allocated(text) == {"vmem": 0x140, "smem": 12}


def test_slots():
    slots = tpu.busy_slots(
        "== CAPACITY:\nMATMUL, VALU\n    2     4\n== UTILIZATION:\n2 4\n0 2\n1 0\n"
    )
    assert slots.shares(tpu.Span(0, 1, 0, 0)) == {"MATMUL": 0.5, "VALU": 0.75}
    assert tpu.busy_slots("") == tpu.UnitSlots()
    assert tpu.UnitSlots().shares(tpu.Span(0, 1, 0, 0)) == {}


def test_kernels_of_a_dump(tmp_path):
    code = kernel_text([("LB", 1, MATMUL), ("", 1, ADD)])
    for stamp, name, text in (
        ("1", "fusion.1", kernel_text([("", 0, ADD)])),
        ("2", "sadsl_forward.1", code),
        ("3", "TLP", code),
    ):
        (tmp_path / f"{stamp}-{name}-72-final_bundles.txt").write_text(text)
        other = tmp_path / f"{stamp}-{name}-71-schedule-analysis_final_bundles.txt"
        other.write_text("total scheduled bundles: 2")
    space = "space=vmem, size = 16, offset = 0"
    (tmp_path / "2-sadsl_forward.1-69-post-delay-converter.txt").write_text(space)
    (kernel,) = tpu.read_kernels(tmp_path)
    assert (kernel.name, kernel.bundles, kernel.vmem) == ("sadsl_forward.1", 2, 16)
    assert kernel.loops == tpu.loops(code)
