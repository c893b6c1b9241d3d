"""The command line: help, words, files, and bad input in one line."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import command_line
import pytest

import sadsl as sa
from sadsl.cli import bench, commands
from sadsl.cli.main import COMMANDS, main

SPEC = "causal() & (window(9) | sinks(2))"
FLAG = re.compile(r"--(\w+)")


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


@pytest.mark.usefixtures("quick")
def test_dense_attention_that_is_too_large_is_refused(fail, monkeypatch):
    monkeypatch.setattr(bench.machine, "memory", lambda: 1000)
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
    monkeypatch.setattr(commands, "lowered", broken(RuntimeError("no\nlibtpu")))
    assert fail("asm", "causal()") == (1, "sadsl asm: no libtpu")


def test_an_interruption_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(commands, "lowered", broken(KeyboardInterrupt()))
    assert main(["asm", "causal()"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(commands, "lowered", broken(KeyError("ours")))
    with pytest.raises(KeyError):
        main(["asm", "causal()"])


# --- as a program ---


def test_the_package_installs_the_program():
    project = Path(command_line.__file__).parent.parent / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    module, name = scripts["sadsl"].split(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.slow
def test_as_a_program():
    program = [sys.executable, "-m", "sadsl"]
    done = subprocess.run([*program, "show", SPEC, "--seq_len", "5"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stderr == ""
    shown = [line[2:].replace(" ", "") for line in done.stdout.splitlines()[5:]]
    assert "\n".join(shown) == sa.parse(SPEC).picture(5)
    done = subprocess.run([*program, "plan"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_a_named_target_starts_no_device(monkeypatch):
    """A platform that is not here prints warnings as it starts."""
    monkeypatch.delenv("JAX_PLATFORMS")
    program = [sys.executable, "-m", "sadsl"]
    done = subprocess.run([*program, "explain", SPEC, "--target", "h100"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stderr == ""


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
    assert values("properties", "causal()")["coverage"] == 1.0
