"""Compiles a lowered program in another process, with the flags that show its code.

The process gets a temporary folder, which goes when it ends, however it ends. What it
wrote is kept by content: by the text of the program, the chip, and the versions of what
compiles (``lowering.targets.store`` says where).
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import jax

from lowering.targets import gpu, store, tpu
from lowering.targets.chips import Target, find
from lowering.targets.clients import program_bytes

# Seconds after which a compiler is stopped. Kernels take 1 to 20 on two slow cores.
TIMEOUT = 300.0
# Changes whenever what is kept changes its form.
FORM = "1"
CHILD = sys.executable, "-m", "lowering.targets.child"
COMPILERS = re.compile(r"^(jax|jaxlib|libtpu|jax-cuda\d+-\w+|nvidia-cuda-nv\w+)$")
# The lines of a compiler's error that say what is wrong.
KEY_LINES = (
    re.compile(r"Ran out of memory in memory space [^\n]*"),
    re.compile(r"Scoped allocation with size [^\n]*"),
    re.compile(r"[^\n]*(?:RESOURCE_EXHAUSTED|UNIMPLEMENTED|INVALID_ARGUMENT)[^\n]*"),
)


@dataclass(frozen=True)
class CompilerOutput:
    """What a compiler has made of a program.

    Attributes:
      hlo: the optimised program around the kernels.
      memory: bytes of arguments, outputs, temporaries and code.
      files: texts about the kernels by file name, for ``kernels_of`` of tpu or gpu.
      versions: of everything that compiles.
    """

    hlo: str = field(repr=False)
    memory: dict[str, int]
    files: dict[str, str] = field(repr=False)
    versions: dict[str, str]


def compile_outside(
    lowered: jax.stages.Lowered, target: str, *, timeout: float | None = None
) -> CompilerOutput:
    """Compiles a program for a chip, or returns what an earlier compilation made.

    Args:
      lowered: the program, lowered for the platform of the chip.
      target: the name of a chip.
      timeout: seconds after which the compiler is stopped; ``TIMEOUT`` if None.

    Raises:
      RuntimeError: the compiler fails, takes too long, or is not installed.
    """
    chip, versions = find(target), compiler_versions()
    timeout = TIMEOUT if timeout is None else timeout
    parts = (FORM, target, json.dumps(versions), lowered.as_text())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    kept = store.load(key)
    if kept is not None:
        return CompilerOutput(**kept)
    if chip.platform == "cuda" and not gpu.has_plugin():
        raise RuntimeError(gpu.missing_tools())
    with tempfile.TemporaryDirectory(prefix="sadsl-", ignore_cleanup_errors=True) as x:
        folder = Path(x)
        (folder / "program").write_bytes(program_bytes(lowered))
        (folder / "request.json").write_text(json.dumps({"target": target}))
        (folder / "dump").mkdir()
        _run(folder, chip, timeout)
        made = CompilerOutput(
            (folder / "program.hlo").read_text(),
            json.loads((folder / "result.json").read_text()),
            _files(folder / "dump", chip, timeout),
            versions,
        )
    store.save(key, asdict(made))
    return made


def compiler_versions() -> dict[str, str]:
    """The installed packages that make code, by name."""
    named = {x.metadata["Name"].lower(): x.version for x in distributions()}
    return {name: named[name] for name in sorted(named) if COMPILERS.match(name)}


def environment(dump: Path, chip: Target) -> dict[str, str]:
    """The environment of the process: no device, and the flags of its compiler."""
    flag, flags = (
        ("LIBTPU_INIT_ARGS", tpu.DUMP_FLAGS)
        if chip.platform == "tpu"
        else ("XLA_FLAGS", gpu.DUMP_FLAGS)
    )
    given = os.environ.get(flag, "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        # Nothing runs on a TPU: libtpu need not ask a cloud, nor own a chip.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        flag: f"{given} {flags.format(dump)}".strip(),
    }


def _run(folder: Path, chip: Target, timeout: float) -> None:
    """Runs the compiler's process until it ends or its time is over."""
    process = subprocess.Popen(
        [*CHILD, str(folder)],
        env=environment(folder / "dump", chip),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, so that helpers of the compiler are stopped with it.
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"target={chip.name!r}: the compiler took more than {timeout:g} s and was "
            "stopped: pass a larger timeout=, or make the call smaller"
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        error = folder / "error.txt"
        whole = error.read_text() if error.exists() else said
        raise RuntimeError(explained(whole, chip, process.returncode))


def explained(text: str, chip: Target, code: int) -> str:
    """A compiler's error in one line, with what can be done about it."""
    lines = [m[0] for pattern in KEY_LINES for m in pattern.finditer(text)]
    said = [line.strip() for line in text.splitlines() if line.strip()]
    key = lines[0] if lines else (said[-1] if said else f"it ended with code {code}")
    if re.search(r"libtpu could not|pip install", text):
        way = "install what is missing"
    elif re.search(r"memory|allocation|RESOURCE_EXHAUSTED", key):
        way = (
            "name smaller blocks, config=KernelConfig(block_q=..., block_kv=...), or "
            "shorten the call"
        )
    else:
        way = (
            "try other blocks with config=KernelConfig(...), or impl='xla', and "
            "report the spec and the sizes if they should work"
        )
    return f"target={chip.name!r}: the compiler refuses: {key.strip()[:400]}: {way}"


def _files(dump: Path, chip: Target, timeout: float) -> dict[str, str]:
    if chip.gpu is None:
        return tpu.dump_files(dump)
    return gpu.dump_files(dump, chip.gpu.architecture, timeout)
