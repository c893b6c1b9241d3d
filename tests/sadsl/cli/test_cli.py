"""The command line: outputs are those of the library, and bad input is one line."""

import importlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sadsl as sa
from sadsl.cli import main as cli
from sadsl.cli.main import COMMANDS, main

SPEC = "causal() & (window(9) | sinks(2))"
FLAG = re.compile(r"--(\w+)")
# The functions of these names hide their modules.
MODULES = {
    name: importlib.import_module(f"sadsl.cli.{name}") for name in ("bench", "doctor")
}


@pytest.fixture
def run(capsys):
    """Runs a command line that must succeed: what it prints."""

    def run(*args):
        code = main(args)
        found = capsys.readouterr()
        assert (code, found.err) == (0, ""), found.err
        return found.out.removesuffix("\n")

    return run


@pytest.fixture
def values(run):
    """The values that a command line prints with ``--json``."""
    return lambda *args: json.loads(run(*args, "--json"))


@pytest.fixture
def fail(capsys):
    """Runs a command line that must fail: its exit code and its line on stderr."""

    def fail(*args):
        code = main(args)
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.count("\n") == 1
        return code, found.err.removesuffix("\n")

    return fail


# --- help ---


def test_help_lists_the_commands(run):
    assert run("--help") == run("-h")
    assert [x.split()[0] for x in run("--help").splitlines() if x.startswith("  ")] == [
        "explain", "show", "asm", "properties", "plan", "bench", "doctor",
    ]  # fmt: skip
    assert run("--version") == sa.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_its_own_flags(name, run):
    text = run(name, "--help")
    body, example = text.split("Example:\n")
    mine = [option.name for option in COMMANDS[name].options]
    assert FLAG.findall(body) == [*mine, "json"]
    assert set(FLAG.findall(example)) <= set(mine)
    assert max(map(len, text.splitlines())) <= 88


def test_flags_of_other_commands_are_unknown(fail):
    code, line = fail("doctor", "--rounds", "3")
    assert (code, line) == (2, "sadsl doctor: Unknown command line flag 'rounds'")


# --- what is said of a spec ---


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
    assert lines[:2] == [
        SPEC, "13 queries (down) x 17 keys (across): # sees, . does not see",
    ]  # fmt: skip
    assert lines[3] == "   0       4       8       12      16"
    assert [line[:2].strip() for line in lines[4:]][::4] == ["0", "4", "8", "12"]
    assert [line[3:].replace(" ", "") for line in lines[4:]] == rows


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
    assert "+ decided at run time by kv_segment_ids, q_segment_ids" in text
    assert [line[2:] for line in text.splitlines()[4:]] == ["+ . .", "+ + .", "+ + +"]


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
    assert code.startswith("HloModule")
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


@pytest.mark.parametrize("report", [Figures(), "spills  0"], ids=["values", "text"])
def test_asm_prints_what_the_compiler_gives(report, run, values, monkeypatch):
    compiled = SimpleNamespace(asm=lambda: "code", report=lambda: report)
    term = sa.softmax(sa.causal())
    low = SimpleNamespace(
        compile=lambda: compiled, target="h100", options=SimpleNamespace(term=term)
    )
    monkeypatch.setattr(cli.commands, "lowered", lambda *args, **options: low)
    about = {"spec": "softmax(causal())", "target": "h100"}
    assert run("asm", "causal()") == "code"
    assert values("asm", "causal()") == {**about, "asm": "code"}
    assert run("asm", "causal()", "--report") == "spills  0"
    held = {"spills": 0} if isinstance(report, Figures) else "spills  0"
    assert values("asm", "causal()", "--report") == {**about, "report": held}


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


# --- timing ---


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
    text = MODULES["bench"]._text(
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


# --- the machine ---


def test_doctor(run, values):
    found = values("doctor")
    assert found["parts"]["jax"] == jax.__version__
    assert found["devices"][0].startswith("cpu: cpu")
    assert found["targets"]["cpu"] == "HLO"
    missing = {part["name"] for part in found["missing"]}
    assert missing == {name for name, v in found["parts"].items() if v is None}
    text = run("doctor")
    for part in found["missing"]:
        assert part["command"] in text


def test_doctor_says_what_adds_a_package(values, run, monkeypatch):
    doctor = MODULES["doctor"]
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "_tool", lambda name: "/cuda/bin/" + name)
    found = values("doctor")
    assert found["targets"]["tpu-v6e"] is None
    assert found["parts"]["ptxas"] == "/cuda/bin/ptxas"
    missing = {part["name"]: part["command"] for part in found["missing"]}
    assert missing["libtpu"] == "pip install libtpu"
    assert "ptxas" not in missing
    assert "pip install libtpu" in run("doctor")


def test_a_tool_of_cuda_is_found_in_its_wheel(tmp_path, monkeypatch):
    path = tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert MODULES["doctor"]._tool("nvdisasm") == str(path)
    assert MODULES["doctor"]._tool("ptxas") is None


# --- words and files ---


def test_a_spec_in_a_file(values, tmp_path):
    text, saved = tmp_path / "spec.txt", tmp_path / "spec.json"
    text.write_text("causal() & (\n  window(9) | sinks(2)\n)\n")
    sa.save(SPEC, saved)
    for path in (text, saved):
        assert values("plan", f"@{path}", "--seq_len", "37")["spec"] == SPEC


def test_flags_may_stand_before_the_spec(values):
    assert values("plan", "--seq_len=37", "causal()")["q_seq_len"] == 37


BAD = {
    "": "sadsl: no command: write one of explain, show",
    "expain causal()": "sadsl: unknown command 'expain': write one of explain, show",
    "plan": "sadsl plan: no SPEC: write one",
    "plan causal() window(3)": "sadsl plan: unexpected 'window(3)'",
    "doctor causal()": "sadsl doctor: unexpected 'causal()'",
    "plan causal()&windw(3)": "sadsl plan: at position 9, the spec has the unknown "
    "name 'windw': did you mean 'window'?",
    "plan causal()&qqqqqq(3)": "sadsl plan: at position 9, the spec has the unknown "
    "name 'qqqqqq'",
    "plan causal(": "sadsl plan: at position 0, the spec is not an expression",
    "plan window(-1)": "sadsl plan: at position 0, the spec is refused: window",
    "plan @absent": "sadsl plan: the file 'absent' cannot be read",
    "plan causal() --seq_len 0": "sadsl plan: flag --seq_len=0: 0 is not a positive",
    "plan causal() --seq_len x": "sadsl plan: flag --seq_len=x: invalid literal",
    "plan causal() --seq_len": "sadsl plan: Missing value for flag --seq_len",
    "plan causal() --seq 3": "sadsl plan: Unknown command line flag 'seq'. Did you",
    "plan joint(full(),gated(linear(),full()))": "sadsl plan: at position 0, the spec",
    "plan gated(causal(),full())": "sadsl plan: spec=gated(causal(), full()) is more",
    "show causal() --head 1": "sadsl show: --head=1: must be below --heads, which is 1",
    "show causal() --png absent/x.png": "sadsl show: [Errno 2] No such file",
    "show causal() --png x.foo": "sadsl show: Format 'foo' is not supported",
    "explain causal() --dtype int8": "sadsl explain: flag --dtype=int8: value should",
    "explain causal() --target tpu": "sadsl explain: target='tpu': must be None or one",
    "explain causal() --kv_heads 3": "sadsl explain: ",
    "explain causal() --array x": "sadsl explain: --array=x: must look like scores=",
    "explain causal() --array x=foo3[2]": "sadsl explain: --array=x=foo3[2]: data type",
    "explain causal() --array x=int32[2]": "sadsl explain: ",
    "bench causal()&window(1) --seq_len 9999999": "sadsl bench: the mask needs ",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_2(line, fail, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, found = fail(*line.split())
    assert code == 2
    assert found.startswith(BAD[line])


def test_dense_attention_that_is_too_large_is_refused(fail, monkeypatch):
    monkeypatch.setattr(MODULES["bench"].machine, "memory", lambda: 1000)
    sizes = "--seq_len", "64", "--heads", "1", "--head_dim", "8"
    code, line = fail("bench", "causal()", *sizes)
    assert code == 2
    assert "GiB of memory for this call" in line


def test_pictures_without_matplotlib_are_refused(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, line = fail("show", "causal()", "--png", "x.png")
    assert (code, line) == (
        2,
        "sadsl show: --png=x.png: pictures need matplotlib, which is not installed: "
        "pip install matplotlib",
    )


def broken(error):
    def run(*args, **options):
        raise error

    return run


def test_a_tool_that_fails_is_one_line_and_1(fail, monkeypatch):
    monkeypatch.setattr(cli.commands, "lowered", broken(RuntimeError("no\nlibtpu")))
    assert fail("asm", "causal()") == (1, "sadsl asm: no libtpu")


def test_an_interruption_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(cli.commands, "lowered", broken(KeyboardInterrupt()))
    assert main(["asm", "causal()"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli.commands, "lowered", broken(KeyError("ours")))
    with pytest.raises(KeyError):
        main(["asm", "causal()"])


# --- as a program ---


@pytest.mark.slow
def test_as_a_program():
    program = [sys.executable, "-m", "sadsl"]
    done = subprocess.run([*program, "show", SPEC, "--seq_len", "5"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stderr == ""
    shown = [line[2:].replace(" ", "") for line in done.stdout.splitlines()[4:]]
    assert "\n".join(shown) == sa.parse(SPEC).picture(5)
    done = subprocess.run([*program, "plan"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_a_reader_may_stop_early():
    """Such as ``sadsl ... | head``: no traceback."""
    code = "import os, sys; os.close(0); r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
    code += "from sadsl.cli.main import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("quick")
def test_the_page_is_current():
    assert command_line.PAGE.read_text() == command_line.page(), (
        "run python docs/command_line.py"
    )


def test_values_are_plain(values):
    """JSON has the numbers of the library, at any size."""
    found = values("plan", "causal()", "--seq_len", "1000000")
    assert found["pairs"] == 1_000_000 * 1_000_001 // 2
    assert np.isclose(values("properties", "causal()")["coverage"], 1.0)
