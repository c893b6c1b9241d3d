"""``sadsl doctor``: which packages, tools, devices and targets are here."""

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags

from lowering.targets.chips import TARGETS
from sadsl.cli import machine
from sadsl.cli.command import CommandResult
from sadsl.cli.progress import progress

ABSENT = "-"
CUDA_PLUGINS = "jax-cuda13-plugin", "jax-cuda12-plugin"


@dataclass(frozen=True)
class Tool:
    """A package or a program: ``gives`` says what it is for, ``command`` adds it."""

    name: str
    gives: str
    command: str
    # Distributions of which one is enough; empty for a program of CUDA.
    packages: tuple[str, ...] = ()

    @property
    def found(self) -> str | None:
        """The version of the package or the path of the program, if it is here."""
        if not self.packages:
            return _tool(self.name)
        return next(filter(None, map(_version, self.packages)), None)


TOOLS = (
    Tool("sadsl", "", "", ("sadsl",)),
    Tool("jax", "", "", ("jax",)),
    Tool("jaxlib", "", "", ("jaxlib",)),
    Tool("flax", "sadsl.layers", "pip install flax", ("flax",)),
    Tool("matplotlib", "pictures, --png", "pip install matplotlib", ("matplotlib",)),
    Tool("libtpu", "code of TPUs", "pip install libtpu", ("libtpu",)),
    Tool("CUDA plugin", "NVIDIA GPUs, PTX", "pip install 'jax[cuda13]'", CUDA_PLUGINS),
    Tool("ptxas", "registers, spills", "pip install nvidia-cuda-nvcc"),
    Tool("nvdisasm", "SASS", "pip install nvidia-cuda-nvdisasm"),
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    """The path of a program of CUDA: where the shell looks, or in a wheel."""
    on_path = shutil.which(name)
    if on_path:
        return on_path
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = (path for folder in folders for path in Path(folder).glob(f"*/bin/{name}"))
    return next((str(path) for path in sorted(found)), None)


def doctor(asked: flags.FlagValues) -> CommandResult:
    """Lists what is here, and for what is missing the command that adds it."""
    del asked
    found = {tool.name: tool.found for tool in TOOLS}
    with progress("starting the devices"):
        try:
            devices = machine.devices()
        except RuntimeError as error:
            devices = [f"none: {error}".splitlines()[0]]
    values = {
        "python": platform.python_version(),
        "cpu": machine.cpu(),
        "devices": devices,
        "tools": found,
        "targets": {name: _code(name, found) for name in ("cpu", *TARGETS)},
        "caches": _caches(),
        "missing": [
            {"name": tool.name, "gives": tool.gives, "command": tool.command}
            for tool in TOOLS
            if found[tool.name] is None
        ],
    }
    return CommandResult(_text(values), values)


def _code(target: str, found: dict[str, str | None]) -> str | None:
    """The code of a target that ``sadsl asm`` can show on this machine, if any."""
    if target == "cpu":
        return "HLO"
    if TARGETS[target].platform == "tpu":
        return "TPU program" if found["libtpu"] else None
    return "Triton IR"


def _caches() -> dict[str, str | None]:
    """Where compiled programs are kept, by who keeps them; None keeps none."""
    return {"jax": jax.config.jax_compilation_cache_dir}  # type: ignore[missing-attribute]


def _text(values: dict[str, Any]) -> str:
    facts = [
        ("python", values["python"]),
        ("cpu", values["cpu"]),
        *(("device", device) for device in values["devices"]),
    ]
    by_code: dict[str, list[str]] = {}
    for target, code in values["targets"].items():
        by_code.setdefault(code or ABSENT, []).append(target)
    codes = [(code, ", ".join(names)) for code, names in by_code.items()]
    caches = [
        (who, where or "off; JAX_COMPILATION_CACHE_DIR=FOLDER turns it on")
        for who, where in values["caches"].items()
    ]
    sections = [
        _columns(facts),
        _columns([(t.name, values["tools"][t.name] or ABSENT, t.gives) for t in TOOLS]),
        "code that `sadsl asm` shows here\n" + _columns(codes),
        "caches of compiled programs\n" + _columns(caches),
    ]
    if values["missing"]:
        rows = [
            (tool["command"], f"{tool['name']}: {tool['gives']}")
            for tool in values["missing"]
        ]
        sections.append("what is missing, and what adds it\n" + _columns(rows))
    return "\n\n".join(sections)


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns, each to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in line).rstrip() for line in lines)
