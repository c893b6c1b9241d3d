"""The launcher on small commands: output, losses, restarts, and what is left behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest

SCRIPT = Path(launch.__file__)


def run(code, *flags, timeout=60):
    """Launches processes of a line of Python; ``rank`` and ``of`` are given."""
    given = (
        "import os, signal, sys, time; rank = int(os.environ['LAUNCH_RANK']); "
        "of = int(os.environ['LAUNCH_PROCESSES']); "
    )
    command = [sys.executable, SCRIPT, *flags, "--", sys.executable, "-c", given + code]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout
    )


def said(done):
    """The lines of the launcher, without its name."""
    lines = done.stdout.splitlines()
    return [x.removeprefix("[launch] ") for x in lines if x.startswith("[launch] ")]


def test_every_process_finds_its_place_and_its_lines_are_marked():
    code = (
        "names = ['JAX_COORDINATOR_ADDRESS', 'JAX_COORDINATOR_BIND_ADDRESS', "
        "'JAX_NUM_CPU_DEVICES', 'JAX_PLATFORMS', 'LAUNCH_HEARTBEAT_TIMEOUT']; "
        "print(of, *map(os.environ.get, names)); print('on stderr', file=sys.stderr)"
    )
    done = run(code, "--processes=3", "--devices_each=5", "--heartbeat_timeout=7")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (address,) = {x.split()[2] for x in lines if "stderr" not in x}
    assert address.startswith("127.0.0.1:")
    places = [f"[{i}] 3 {address} {address} 5 cpu 7" for i in range(3)]
    errors = [f"[{i}] on stderr" for i in range(3)]
    assert sorted(lines) == sorted(places + errors)


@pytest.mark.parametrize(
    ("death", "how", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL", 137),
        ("os.abort()", "killed by SIGABRT", 134),
        ("sys.exit(3)", "exit status 3", 3),
    ],
)
def test_a_lost_process_is_named_in_one_line(death, how, status):
    code = (
        f"print('pid', os.getpid())\nif rank == 1: {death}\n"
        "time.sleep(1); sys.exit(9 if rank else 0)"
    )
    done = run(code, "--processes=3", "--heartbeat_timeout=4")
    assert done.returncode == status, done.stdout + done.stderr
    (pid,) = (x.split()[-1] for x in done.stdout.splitlines() if "[1] pid" in x)
    first, *others = said(done)
    assert first == f"lost process 1 (pid {pid}): {how}; 2 left, with 34 s to end"
    ends = sorted(x.split(" ended after ")[0] + x.split(" s:")[1] for x in others)
    assert ends == ["process 0 exit status 0", "process 2 exit status 9"]


def test_processes_that_do_not_end_are_killed(capfd):
    code = (
        "import os, time; os.environ['LAUNCH_RANK'] == '2' or time.sleep(60); exit(4)"
    )
    start = time.monotonic()
    given = launch.environment(3, 1, None)
    with launch.Group([sys.executable, "-c", code], 3, given) as group:
        lost = group.watch(0.5)
    assert time.monotonic() - start < 20
    assert (lost.rank, lost.status, lost.exit_status) == (2, 4, 4)
    printed = capfd.readouterr().out
    assert "after 0.5 s there is no end of 0, 1: killed" in printed
    assert printed.count("killed by SIGKILL") == 2
    assert [x.returncode for x in group.processes] == [-9, -9, 4]


def test_a_restart_has_fewer_processes():
    """The first start loses a process; the second one ends well, or another dies."""
    code = "print('one of', of); sys.exit(5 if of == 3 and rank == 2 else {0})"
    flags = "--processes=3", "--restarts=2", "--processes_after_loss=2"
    done = run(code.format(0), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("one of 3") == 3
    assert done.stdout.count("one of 2") == 2
    restarts = [x for x in said(done) if "restart" in x]
    assert restarts == [
        "restart 1 of 2 with 2 processes: the command goes on from its last checkpoint"
    ]
    again = run(code.format("6 if rank == 1 else 0"), *flags)
    assert again.returncode == 6
    assert again.stdout.count("one of 2") == 4
    assert [x[:12] for x in said(again) if "lost" in x] == ["lost process"] * 3


def test_a_refused_command_is_not_restarted():
    done = run("sys.exit(2)", "--processes=1", "--restarts=3")
    assert done.returncode == 2
    assert said(done)[-1] == "status 2 says that the command was refused: no restart"
    assert done.stdout.count("lost process") == 1


def runs(pid):
    """Whether a process runs; one that nobody has waited for yet has ended."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_processes_end_with_the_launcher(number):
    """And what they started themselves."""
    code = (
        "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--processes=2", "--", *command],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as launcher:  # fmt: skip
        pids = [int(launcher.stdout.readline().split()[-1]) for _ in range(4)]
        assert all(map(runs, pids))
        launcher.send_signal(number)
        launcher.stdout.read()
    assert launcher.returncode == 128 + number
    patience = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(runs, pids))


def test_a_command_that_is_not_there_is_refused():
    for command in ([], ["--", "/nowhere/python", "x.py"]):
        done = subprocess.run(
            [sys.executable, SCRIPT, *command],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert ("/nowhere/python" if command else "write it behind") in done.stdout
        assert "Traceback" not in done.stderr


# A sum over the devices of all processes, again and again, until one stands still.
HANGS = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import jax, numpy as np
from jax.experimental import multihost_utils
from lm import processes
processes.join()
for step in range(10_000):
    total = int(multihost_utils.process_allgather(np.int32(step)).sum())
    if step == 3:
        print("sum", total)
        if jax.process_index() == HUNG:
            os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_process_that_hangs_is_noticed_by_its_heartbeats(hung):
    """Its connections stay open. The other one ends; the launcher kills it at last."""
    done = run(
        f"HUNG = {hung}\n{HANGS}", "--processes=2", "--devices_each=1",
        "--heartbeat_timeout=5", timeout=180,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGABRT, done.stdout + done.stderr
    assert [f"[{i}] sum 6" in done.stdout.splitlines() for i in range(2)] == [True] * 2
    first, second, third = said(done)
    assert first.startswith(f"lost process {1 - hung} (pid ")
    assert first.endswith("killed by SIGABRT; 1 left, with 35 s to end")
    assert second == f"after 35 s there is no end of {hung}: killed"
    assert third.startswith(f"process {hung} ended after 35.")
