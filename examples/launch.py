"""Starts several processes of a training command on this machine, over loopback.

    python examples/launch.py --processes=2 --devices_each=4 -- \\
        python examples/train_lm.py --mesh=batch=2,sequence=4
    python examples/launch.py --processes=4 --restarts=1 --processes_after_loss=2 -- \\
        python examples/train_lm.py --mesh=batch=-1 --batch_size=4

It tries out on one machine what a cluster does: each process has its own devices, and
``jax.distributed`` joins them. Every process runs the same command, and finds its place
in the environment: ``JAX_COORDINATOR_ADDRESS``, ``LAUNCH_PROCESSES``, ``LAUNCH_RANK``
and ``LAUNCH_HEARTBEAT_TIMEOUT``, which ``join`` of ``examples/lm/processes.py`` reads.
Output comes line by line behind ``[rank]``.

If a process ends with another status than 0, one line names it. The others notice it
themselves, by a closed connection or by missing heartbeats, and end. Those that are
left 30 seconds after the heartbeat timeout are killed. With ``--restarts`` the command
starts again, and goes on from its last checkpoint if it keeps any. The exit status is
that of the process that was lost last, or 128 and the number of its signal.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple

from absl import app, flags

# A process that refuses its flags ends with this status, and would do so again.
REFUSED = 2
# Seconds beyond the heartbeat timeout in which the others of a lost process must end.
GRACE = 30.0

_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes to start.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices_each", None, "Virtual CPU devices of each process; None: what it finds.",
    lower_bound=1,
)  # fmt: skip
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 10,
    "Seconds without a heartbeat after which a process counts as lost.", lower_bound=1,
)  # fmt: skip
_RESTARTS = flags.DEFINE_integer(
    "restarts", 0, "How often to start the command again after a loss.", lower_bound=0
)
_AFTER_LOSS = flags.DEFINE_integer(
    "processes_after_loss", None,
    "Processes of a restarted command; None: as many as before.", lower_bound=1,
)  # fmt: skip


class Ended(NamedTuple):
    """A process that ended: its status as ``subprocess`` says it, and when."""

    rank: int
    pid: int
    status: int
    time: float

    @property
    def how(self) -> str:
        """The exit status or the signal, in words."""
        if self.status >= 0:
            return f"exit status {self.status}"
        try:
            return f"killed by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"killed by signal {-self.status}"

    @property
    def exit_status(self) -> int:
        """The status that a shell would give it."""
        return self.status if self.status >= 0 else 128 - self.status


def put(whose: int | str, text: str) -> None:
    """Prints a line of a process, or of the launcher, in one piece."""
    sys.stdout.write(f"[{whose}] {text}\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Prints a line of the launcher."""
    put("launch", text)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(processes: int, heartbeat: int, devices: int | None) -> dict[str, str]:
    """What the environment of every process says of its group."""
    address = f"127.0.0.1:{free_port()}"
    said = {
        "JAX_COORDINATOR_ADDRESS": address,
        # The default would listen on every interface of this machine.
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "LAUNCH_PROCESSES": str(processes),
        "LAUNCH_HEARTBEAT_TIMEOUT": str(heartbeat),
        # Lines come when they are printed, also the last ones before a kill.
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        said |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return said


class Group:
    """The processes of one start. Use it as a context manager, which kills the rest."""

    def __init__(
        self, command: Sequence[str], processes: int, given: Mapping[str, str]
    ) -> None:
        self.processes: list[subprocess.Popen] = []
        self.relays: list[threading.Thread] = []
        # In the order of their ends, as far as the operating system tells.
        self.ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        for rank in range(processes):
            process = subprocess.Popen(
                command,
                env={**os.environ, **given, "LAUNCH_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # a kill reaches what it started, too
            )
            self.processes.append(process)
            self.relays.append(_thread(_relay, rank, process.stdout))
            _thread(self._wait, rank, process)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        # A grandchild may hold a pipe open for as long as it likes.
        for relay in self.relays:
            relay.join(timeout=5)

    def _wait(self, rank: int, process: subprocess.Popen) -> None:
        status = process.wait()
        self.ended.put(Ended(rank, process.pid, status, time.monotonic()))

    def kill(self) -> list[int]:
        """Kills the processes that run, and returns their ranks."""
        running = [i for i, x in enumerate(self.processes) if x.poll() is None]
        for rank in running:
            os.killpg(self.processes[rank].pid, signal.SIGKILL)
        return running

    def watch(self, seconds: float) -> Ended | None:
        """Waits for the ends of all processes; returns the first that failed, if any.

        Those that run ``seconds`` after that are killed.
        """
        lost, deadline = None, None
        for left in reversed(range(len(self.processes))):
            ended = self._next(deadline)
            if ended is None:
                ranks = ", ".join(map(str, self.kill()))
                say(f"after {seconds:g} s there is no end of {ranks}: killed")
                ended, deadline = self.ended.get(), None
            if lost is not None:
                after = ended.time - lost.time
                say(f"process {ended.rank} ended after {after:.1f} s: {ended.how}")
            elif ended.status:
                lost, deadline = ended, ended.time + seconds
                others = f"; {left} left, with {seconds:g} s to end" if left else ""
                say(f"lost process {ended.rank} (pid {ended.pid}): {ended.how}{others}")
        return lost

    def _next(self, deadline: float | None) -> Ended | None:
        """The next end, or None if there is none before the deadline."""
        if deadline is None:
            return self.ended.get()
        try:
            return self.ended.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None


def _thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def _relay(rank: int, pipe: IO[bytes]) -> None:
    """Prints what a process prints, whole lines at a time."""
    with pipe:
        for line in pipe:
            put(rank, line.decode(errors="replace").rstrip("\n"))


def launch(command: Sequence[str]) -> int:
    """Runs the command, again after losses as the flags allow; returns a status."""
    processes = _PROCESSES.value
    for again in range(_RESTARTS.value + 1):
        if again:
            say(
                f"restart {again} of {_RESTARTS.value} with {processes} processes: the "
                "command goes on from its last checkpoint"
            )
        given = environment(processes, _HEARTBEAT.value, _DEVICES.value)
        with Group(command, processes, given) as group:
            lost = group.watch(_HEARTBEAT.value + GRACE)
        if lost is None:
            return 0
        if lost.status == REFUSED:
            say(f"status {REFUSED} says that the command was refused: no restart")
            break
        processes = _AFTER_LOSS.value or processes
    return lost.exit_status


def main(argv: Sequence[str]) -> int:
    """Launches the command behind the flags."""
    command = list(argv[1:])
    if not command:
        print(
            "there is no command to start: write it behind the flags and --, such as\n"
            "  python examples/launch.py --processes=2 -- python train.py"
        )
        return REFUSED
    # As with Ctrl-C, the processes end with the launcher.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return launch(command)
    except FileNotFoundError as error:
        print(f"cannot start the command: {error}")
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted: the processes are killed")
        return 130


if __name__ == "__main__":
    app.run(main)
