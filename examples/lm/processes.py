"""This process among those of a run: joined by ``jax.distributed``, or alone."""

import os
import sys
import time

import jax
from jax.experimental import multihost_utils

# Seconds beyond the heartbeat timeout in which every process must have started.
STARTING = 30
# Seconds that the coordinator gives others which fail as well to say why.
LAST_WORDS = 2


def join() -> None:
    """Joins the processes of ``examples/launch.py``; alone, it does nothing.

    On a TPU pod, or on a GPU cluster under Slurm or Open MPI,
    ``jax.distributed.initialize()`` finds all of this itself and takes the place of
    this function.
    """
    if "LAUNCH_RANK" not in os.environ:
        return
    heartbeat = int(os.environ["LAUNCH_HEARTBEAT_TIMEOUT"])
    # jax takes the addresses from the environment. A process that comes to its end
    # waits for the others, which may wait for it: no longer than for a lost one.
    jax.distributed.initialize(
        num_processes=int(os.environ["LAUNCH_PROCESSES"]),
        process_id=int(os.environ["LAUNCH_RANK"]),
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=heartbeat,
        initialization_timeout=heartbeat + STARTING,
        cluster_detection_method="deactivate",
    )


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, tables, pictures."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has come to the point that ``what`` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def leave(status: int) -> None:
    """Ends this process of several at once, after a failure; alone, it does nothing.

    Others that wait for this one notice that it is gone. An ordinary end would wait for
    them, and then be reported as a timeout of all instead of a failure of one.
    """
    if jax.process_count() > 1:
        if is_first():  # without it, jax aborts the others
            time.sleep(LAST_WORDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
