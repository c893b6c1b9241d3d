"""Reads PTX and SASS of GPU kernels, and runs the tools that make SASS of PTX.

XLA writes PTX with ``--xla_dump_to``. ``ptxas`` assembles it and tells registers and
spills; ``nvdisasm`` shows the assembled code. Neither needs a GPU.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PLUGINS = "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"
TOOLS = "ptxas", "nvdisasm"
DUMP_FLAGS = "--xla_dump_to={}"

ENTRY = re.compile(r"\.entry (\w+)")
SHARED = re.compile(r"(\w+) grid: .*shared_memory: (\d+) bytes")
# What ``ptxas -v`` says about a kernel.
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
# A line of SASS that is an instruction; a label; a branch to a label.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+):")
BRANCH = re.compile(r"BRA\w*(?:\.\w+)*\s+(?:\w+, )?`\((\.L_x_\d+)\)")
# Products on tensor cores: HMMA of Ampere, HGMMA of Hopper, UTCHMMA of Blackwell.
PRODUCT = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class SassLoop:
    """A loop of a kernel: its lines of SASS, both inclusive, and what they hold."""

    first: int
    last: int
    instructions: int
    products: int


@dataclass(frozen=True)
class GpuKernel:
    """The code of one kernel, and what its assembler says.

    Attributes:
      name: the name of the kernel's function.
      ptx, sass: the code; ``sass`` is empty without ptxas and nvdisasm.
      loops: the innermost loops with products on tensor cores, in order of the code.
      products: instructions of tensor cores in SASS, by name.
      registers: per thread.
      spill_stores, spill_loads: bytes per thread.
      shared_memory: bytes per block, or None if XLA did not tell.
    """

    name: str
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    loops: tuple[SassLoop, ...]
    products: dict[str, int]
    registers: int | None
    spill_stores: int | None
    spill_loads: int | None
    shared_memory: int | None


def has_plugin() -> bool:
    """Whether jax's CUDA plugin is installed."""
    parent = find_spec("jax_plugins") is not None
    return parent and any(find_spec(name) is not None for name in PLUGINS)


def tool(name: str) -> str | None:
    """The path of ptxas or nvdisasm: of the CUDA wheels, else in ``PATH``."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name)


def missing_tools() -> str:
    """What GPU code cannot be told here, why, and how to change it; "" if all can."""
    release = version("jax")
    wheels = f'"jax-cuda13-plugin=={release}" "jax-cuda13-pjrt=={release}"'
    if not has_plugin():
        return (
            "no PTX, SASS, registers or spills: jax's CUDA plugin is not installed, "
            f"which compiles without a GPU too: pip install {wheels} 'sadsl[gpu-tools]'"
        )
    absent = [name for name in TOOLS if tool(name) is None]
    if absent:
        return (
            f"no SASS, registers or spills: {' and '.join(absent)} of CUDA are neither "
            "installed nor in PATH: pip install 'sadsl[gpu-tools]'"
        )
    return ""


def dump_files(dump: Path, architecture: str, timeout: float) -> dict[str, str]:
    """The texts that ``kernels_of`` needs, by file name, from a dump of XLA.

    SASS is made here, if ptxas and nvdisasm are there.

    Raises:
      RuntimeError: ptxas refuses the code.
    """
    texts = {}
    for path in sorted(dump.iterdir()):
        if path.name.endswith("thunk_sequence.txt"):
            texts[path.name] = path.read_text()
        if path.suffix != ".ptx" or not ENTRY.search(path.read_text()):
            continue
        texts[path.name] = path.read_text()
        if all(tool(name) for name in TOOLS):
            told, sass = _assembled(path, architecture, timeout)
            texts[f"{path.stem}.ptxas"], texts[f"{path.stem}.sass"] = told, sass
    return texts


def _assembled(path: Path, architecture: str, timeout: float) -> tuple[str, str]:
    """What ptxas says about a file of PTX, and its SASS."""
    cubin = path.with_suffix(".cubin")
    ptxas, nvdisasm = (str(tool(name)) for name in TOOLS)
    options = {"capture_output": True, "text": True, "timeout": timeout}
    command = [ptxas, f"-arch={architecture}", "-v", str(path), "-o", str(cubin)]
    made = subprocess.run(command, **options)
    if made.returncode:
        raise RuntimeError(f"ptxas refuses {path.name}: {made.stderr.strip()[:400]}")
    sass = subprocess.run([nvdisasm, "-c", str(cubin)], **options)
    return made.stderr, sass.stdout


def kernels_of(texts: Mapping[str, str]) -> tuple[GpuKernel, ...]:
    """The kernels of the files that ``dump_files`` returns.

    Fusions of XLA count if they multiply on tensor cores.
    """
    shared = dict(
        pair
        for name, text in texts.items()
        if name.endswith("thunk_sequence.txt")
        for pair in SHARED.findall(text)
    )
    found = []
    for name, ptx in texts.items():
        entry = ENTRY.search(ptx) if name.endswith(".ptx") else None
        if entry is None or not _has_products(ptx):
            continue
        stem = name.removesuffix(".ptx")
        memory = shared.get(entry[1])
        told, sass = texts.get(f"{stem}.ptxas", ""), texts.get(f"{stem}.sass", "")
        found.append(_kernel(entry[1], ptx, told, sass, memory))
    return tuple(found)


def _has_products(ptx: str) -> bool:
    return any(x in ptx for x in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))


def _kernel(name: str, ptx: str, told: str, sass: str, shared: str | None) -> GpuKernel:
    spilled, registers = SPILLS.search(told), REGISTERS.search(told)
    lines = sass.splitlines()
    return GpuKernel(
        name=name,
        ptx=ptx,
        sass=sass,
        loops=sass_loops(lines),
        products=_counted(PRODUCT.findall(sass)),
        registers=int(registers[1]) if registers else None,
        spill_stores=int(spilled[1]) if spilled else None,
        spill_loads=int(spilled[2]) if spilled else None,
        shared_memory=None if shared is None else int(shared),
    )


def sass_loops(lines: list[str]) -> tuple[SassLoop, ...]:
    """The innermost loops with products: from a label to a branch back to it."""
    labels = {m[1]: at for at, line in enumerate(lines) if (m := LABEL.match(line))}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        branch = BRANCH.search(line)
        start = labels.get(branch[1], at + 1) if branch else at + 1
        if start <= at and PRODUCT.search("\n".join(lines[start:at])):
            ends[start] = at
    spans = sorted(ends.items())
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return tuple(
        SassLoop(
            a,
            b,
            sum(bool(INSTRUCTION.match(line)) for line in lines[a : b + 1]),
            sum(bool(PRODUCT.search(line)) for line in lines[a : b + 1]),
        )
        for a, b in inner
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found
