"""Runs of ``examples/train_lm.py`` in processes of their own, at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parent.parent / "examples"
SPEC = "causal() & (window(8) | sinks(2))"
TINY = {
    "steps": 40, "seq_len": 48, "batch_size": 2, "num_layers": 1, "num_heads": 2,
    "d_model": 16, "valid_batches": 2, "valid_every": 20, "checkpoint_every": 16,
    "learning_rate": 0.01,
}  # fmt: skip


def write_texts(folder):
    """Files of words, and one with bytes that are no text."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["while", "return", "yield", "lambda"], 60)
        (folder / f"{i}.txt").write_text(" ".join(words))
    (folder / "deep").mkdir()
    (folder / "deep" / "noise.bin").write_bytes(rng.bytes(200))
    (folder / "empty").write_bytes(b"")
    return folder


# Metrics and a writer of checkpoints that call `kill`: when the line of step 23 is
# written, or when the second checkpoint is half written.
DIES = """
class Metrics(train_lm.Metrics):
    def append(self, history):
        super().append(history)
        if history.step == 23:
            kill()

save = JsonCheckpointHandler.async_save

async def async_save(self, directory, item=None, args=None):
    if args.item["history"]["train"][31:]:
        kill()
    return await save(self, directory, item, args)
"""
# What the script does, until the kernel kills it. The first run is trained without
# disturbance into a folder of its own. Then the whole command starts. It is killed when
# the line of step 23 is written, or when the second checkpoint is half written.
KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES)!r})
import sadsl as sa
import train_lm
from absl import app, flags
from lm import data
from orbax.checkpoint import JsonCheckpointHandler
from rich.console import Console

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

{DIES}
def main(argv):
    asked = flags.FLAGS
    out, asked.out = asked.out, str(Path(asked.out) / "undisturbed")
    corpus = data.load(asked.data, asked.seq_len)
    train_lm.run_one("dense", sa.parse("causal()"), corpus, Console())
    asked.out = out
    if WHERE == "between checkpoints":
        train_lm.Metrics = Metrics
    else:
        JsonCheckpointHandler.async_save = async_save
    return train_lm.main(argv)

app.run(main)
"""


def run_killed(texts, out, where):
    """Runs ``KILLED``; where is "between checkpoints", or while one is written."""
    return run(texts, out, program=("-c", f"WHERE = {where!r}\n{KILLED}"))


def run(
    texts, out, *more, program=(str(EXAMPLES / "train_lm.py"),), launcher=(), **changes
):
    """Runs the script, or the program, with the flags of ``TINY`` and ``changes``.

    With flags of ``examples/launch.py`` it is run in several processes. Programs are
    compiled quickly, and once for all runs on the same texts.
    """
    given = {"data": texts, "out": out, "spec": SPEC, **TINY, **changes}
    flags = [f"--{name}={value}" for name, value in given.items()]
    quick = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(texts.with_name("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    launch = [sys.executable, str(EXAMPLES / "launch.py"), *launcher, "--"]
    return subprocess.run(
        [*(launch if launcher else ()), sys.executable, *program, *flags, *more],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **quick},
    )


def record(out):
    """The JSON of a finished command."""
    return json.loads((out / "train_lm.json").read_text())


def losses(out):
    """The losses of all steps, run by run."""
    return [run["history"]["train"] for run in record(out)["runs"]]


def metrics(out, name):
    """The lines of a metrics file."""
    return [json.loads(x) for x in (out / f"{name}.jsonl").read_text().splitlines()]
