"""What commands say of a spec is what the library says, as text and as values."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import sadsl as sa
from sadsl.cli import commands

SPEC = "causal() & (window(9) | sinks(2))"


def test_plan(run, values):
    args = "--seq_len", "300", "--kv_seq_len", "337", "--block_q", "16", "--heads", "2"
    blocks = {"block_q": 16, "num_heads": 2}
    plan = sa.plan(SPEC, 300, 337, **blocks)
    text = run("plan", SPEC, *args)
    assert str(plan) in text
    total, area = 2 * plan.num_pairs, 2 * 300 * 337
    assert f"{total:,} of {area:,} over all heads" in text.splitlines()[-1]
    found = values("plan", SPEC, *args)
    assert found["pairs"] == total == 2 * sa.parse(SPEC).dense(300, 337)[0].sum()
    assert found["full_blocks"] == plan.num_full
    assert found["partial_blocks"] == plan.num_partial
    assert (found["block_q"], found["block_kv"], found["heads"]) == (16, 128, 2)


def test_plan_in_another_order_and_in_the_given_one(values):
    spec = "strided(64)", "--seq_len", "4096"
    moved, given = values("plan", *spec), values("plan", *spec, "--given_order")
    assert moved["orders"] is not None
    assert given["orders"] is None
    assert moved["pairs"] == given["pairs"]
    assert moved["partial_blocks"] < given["partial_blocks"]


def test_plan_of_what_runs_decide(run, values):
    text = run("plan", "causal() & segments()", "--seq_len", "256")
    assert text.endswith("decided at run time by kv_segment_ids, q_segment_ids")
    assert values("plan", "causal() & segments()", "--seq_len", "256")["pairs"] is None


def test_plan_at_an_offset(values):
    last = "--seq_len", "1", "--kv_seq_len", "130", "--q_offset", "129"
    assert values("plan", "causal() & window(9)", *last)["pairs"] == 10


def test_properties(run, values):
    found = sa.properties(SPEC, 130)
    assert run("properties", SPEC, "--seq_len", "130").endswith(f"\n{found}")
    shown = values("properties", SPEC, "--seq_len", "130")
    assert shown["causal"] is True
    assert shown["pairs_of_some_head"] == found.num_pairs
    assert shown["hops"]["least"] == found.hops.least
    assert shown["cache"]["positions"] == found.cache.size == 12
    assert values("properties", "full()", "--seq_len", "37")["cache"] is None


def test_explain_is_that_of_the_lowered_call(run, values):
    sizes = "--seq_len", "130", "--heads", "4", "--kv_heads", "2", "--head_dim", "32"
    more = "--batch", "3", "--dtype", "float32", "--block_q", "32", "--target", "h100"
    q = jax.ShapeDtypeStruct((3, 130, 4, 32), jnp.float32)
    k = jax.ShapeDtypeStruct((3, 130, 2, 32), jnp.float32)
    low = sa.lower(SPEC, q, k, k, target="h100", config=sa.KernelConfig(block_q=32))
    explained = low.explain()
    assert run("explain", SPEC, *sizes, *more) == str(explained)
    found = values("explain", SPEC, *sizes, *more)
    assert found["arrays"]["k"] == {"shape": [3, 130, 2, 32], "dtype": "float32"}
    assert found["plan"]["block_q"] == 32
    assert found["plan"]["pairs"] == 4 * low.plan.num_pairs
    cost = found["cost"]["this_call"]["backward"]
    assert cost["flops"] == explained.cost.flops(backward=True)
    assert cost["seconds"] > 0
    assert cost["flops"] < found["cost"]["dense"]["backward"]["flops"]


def test_a_mixture_is_explained_by_its_parts(values):
    spec = "average(causal() & window(8), linear(), causal())"
    found = values("explain", spec, "--seq_len", "37", "--target", "tpu-v6e")
    pairs = [part["plan"]["pairs"] for part in found["parts"]]
    assert pairs[1] == found["parts"][1]["plan"]["heads"] * 37 * 38 // 2
    assert found["parts"][0]["softmax"] == "softmax(causal() & window(8))"


def test_arrays_that_a_spec_reads(values):
    sizes = "--seq_len", "37", "--heads", "2", "--target", "cpu"
    packed = values("explain", "causal() & segments()", *sizes)
    assert packed["plan"]["operands"] == ["kv_segment_ids", "q_segment_ids"]
    spec = "softmax(causal(), bias=pair_bias('scores'))"
    array = "--array", "scores=float32[2, 37, 37]"
    assert values("explain", spec, *sizes, *array)["plan"]["pairs"] == 2 * 37 * 38 // 2


# --- pictures ---


def cells(dense, block):
    """The character of each cell of a dense map."""
    found = []
    for top in range(0, len(dense), block):
        row = ""
        for left in range(0, dense.shape[1], block):
            part = dense[top : top + block, left : left + block]
            row += "#" if part.all() else "+" if part.any() else "."
        found.append(row)
    return found


def test_show_draws_the_pairs(run, values):
    spec = sa.parse(SPEC)
    rows = values("show", SPEC, "--seq_len", "13", "--kv_seq_len", "17")["rows"]
    assert "\n".join(rows) == spec.picture(13, 17)
    lines = run("show", SPEC, "--seq_len", "13", "--kv_seq_len", "17").splitlines()
    assert lines[:3] == [
        SPEC, "13 queries (down) x 17 keys (across)", "# sees, . does not see",
    ]  # fmt: skip
    assert lines[4] == "   0       4       8       12      16"
    assert [line[:2].strip() for line in lines[5:]][::4] == ["0", "4", "8", "12"]
    assert [line[3:].replace(" ", "") for line in lines[5:]] == rows


def test_show_draws_long_maps_in_cells(values):
    spec = "causal() & (window(60) | sinks(16))"
    found = values("show", spec, "--seq_len", "512")
    assert found["cell"] == 16
    assert found["rows"] == cells(sa.parse(spec).dense(512)[0], 16)


def test_show_draws_one_head(values):
    spec = "per_head(causal(), window(1), causal(), full())"
    for head, part in enumerate(("causal()", "window(1)", "causal()", "full()")):
        found = values("show", spec, "--seq_len", "5", "--heads", "4",
                       "--head", str(head))  # fmt: skip
        assert "\n".join(found["rows"]) == sa.parse(part).picture(5)


def test_show_marks_what_runs_decide(run):
    text = run("show", "causal() & segments()", "--seq_len", "3")
    assert "# sees, + decided at run time by kv_segment_ids, q_segment_ids, ." in text
    assert [line[2:] for line in text.splitlines()[5:]] == ["+ . .", "+ + .", "+ + +"]


@pytest.mark.parametrize(
    "seq_len", ["37", pytest.param("1024", marks=pytest.mark.slow)]
)
def test_show_writes_a_picture(seq_len, run, tmp_path):
    path = tmp_path / "map.png"
    run("show", "causal() & window(99)", "--seq_len", seq_len, "--png", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


# --- code ---


def instructions(hlo):
    """The lines that compute, without the places of the source that they come from."""
    lines = (line for line in hlo.splitlines() if line.startswith("  "))
    return [line.split(", metadata=")[0] for line in lines if " = " in line]


SMALL = "--seq_len", "37", "--heads", "1", "--head_dim", "8", "--dtype", "float32"


@pytest.mark.usefixtures("quick")
def test_asm(run):
    code = run("asm", "causal()", *SMALL, "--target", "cpu")
    assert code.startswith("-- program\n")
    assert "| HloModule" in code
    assert "hot loop 1" in code
    assert "f32[1,37,1,8]" in code


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_asm_is_that_of_the_compiled_call(run, values):
    x = jax.ShapeDtypeStruct((1, 37, 1, 8), jnp.float32)
    compiled = sa.lower("causal()", x, x, x, target="cpu").compile()
    asked = "asm", "causal()", *SMALL, "--target", "cpu"
    assert instructions(run(*asked)) == instructions(compiled.asm())
    assert run(*asked, "--report") == str(compiled.report())
    assert values(*asked, "--report")["report"]


class Figures:
    """A report that has values beside its text."""

    def __str__(self):
        return "spills  0"

    def as_dict(self):
        return {"spills": 0}


def test_asm_prints_what_the_compiler_gives(run, values, monkeypatch):
    compiled = SimpleNamespace(asm=lambda: "code", report=Figures)
    term = sa.softmax(sa.causal())
    low = SimpleNamespace(compile=lambda: compiled, target="h100", term=term)
    monkeypatch.setattr(commands, "lowered", lambda *args, **options: low)
    about = {"spec": "softmax(causal())", "target": "h100"}
    assert run("asm", "causal()") == "code"
    assert values("asm", "causal()") == {**about, "asm": "code"}
    assert run("asm", "causal()", "--report") == "spills  0"
    held = {**about, "report": {"spills": 0}}
    assert values("asm", "causal()", "--report") == held


@pytest.mark.slow
def test_asm_of_gradients_and_of_chips(values):
    sizes = "--seq_len", "130", "--heads", "2", "--head_dim", "32"
    one, three = (
        values("asm", SPEC, *sizes, "--target", "h100", *more)["asm"]
        for more in ((), ("--gradient",))
    )
    assert (one.count("tt.func"), three.count("tt.func")) == (1, 3)
    tpu = values("asm", SPEC, *sizes, "--target", "tpu-v5e")
    assert tpu["target"] == "tpu-v5e"
    assert tpu["asm"]
