"""Reads the scheduled code of TPU kernels from the dump of libtpu.

libtpu writes one file for each stage of each kernel when ``LIBTPU_INIT_ARGS`` has
``--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true``. A bundle is one very long
instruction word. It takes at least one cycle, so the bundles of a loop bound the time
of one step from below.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# A bundle: its number, perhaps the mark of a loop's first one, a ">" for each loop, and
# instructions. Comments may run over several lines.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0) +(L[BHE])?[^:{]*: (>*) ?\{(.*)")
MATRIX_OP = re.compile(r"vmatmul|vmatpush|vmatprep|vmatres")
MATRIX_LINE = re.compile(r"vmatmul|vmatpush|vmatprep|vmatres|vpop.*mr[fb]")
# Regions of products: the widest gap between two of their lines, the shortest region.
GAP, SHORTEST = 60, 100
# What libtpu allocates, with its size and the place where it begins.
ALLOCATION = re.compile(r"space=(vmem|smem), size = (0x\w+|\d+), offset = (0x\w+|\d+)")
FILE = re.compile(r"^(\d+)-(.*)-(\d+)-(final_bundles|post-delay-converter|"
                  r"schedule-analysis_final_bundles|"
                  r"final_hlo-static-per-bundle-utilization)\.txt$")  # fmt: skip
# What libtpu is told, with the folder; the stages that are read are a tenth of all.
DUMP_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_.*|post-delay-converter"
)


@dataclass(frozen=True)
class Span:
    """Bundles of a kernel that belong together: a loop, or a region of products.

    ``first`` and ``last`` are numbers of bundles, both inclusive. A loop may hold
    bundles of an inner loop without products, which count once.
    """

    first: int
    last: int
    matrix_ops: int
    spills: int

    @property
    def bundles(self) -> int:
        """The number of bundles."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class TpuKernel:
    """The scheduled code of one kernel, and what libtpu allocates for it.

    Attributes:
      name: as in the lowered program, perhaps with a number: "sadsl_forward.1".
      code: one bundle a line, as libtpu prints it.
      loops: the innermost loops with products, in order of the code.
      regions: stretches of code with products, see ``regions``.
      bundles: all bundles of the kernel.
      matrix_ops: operations of the matrix unit in the code.
      spills: bundles that write a spilled register or read it back.
      vmem, smem: bytes of on-chip memory up to the end of the last allocation.
      busy: how many slots of each unit the bundles use, see ``busy_slots``.
    """

    name: str
    code: str = field(repr=False)
    loops: tuple[Span, ...]
    regions: tuple[Span, ...]
    bundles: int
    matrix_ops: int
    spills: int
    vmem: int
    smem: int
    busy: "UnitSlots" = field(repr=False)


@dataclass(frozen=True)
class UnitSlots:
    """How many instructions of each unit a bundle can hold, and how many it has.

    ``used`` has one row for each bundle and one column for each of ``units``.
    """

    units: tuple[str, ...] = ()
    capacity: tuple[int, ...] = ()
    used: tuple[tuple[int, ...], ...] = ()

    def shares(self, span: Span) -> dict[str, float]:
        """The share of the slots of each unit that a span of bundles uses."""
        rows = self.used[span.first : span.last + 1]
        return {
            unit: sum(row[i] for row in rows) / (len(rows) * self.capacity[i])
            for i, unit in enumerate(self.units)
            if rows
        }


def bundle_lines(code: str) -> list[str]:
    """The lines of a file of bundles that hold a bundle."""
    return [line for line in code.splitlines() if BUNDLE.match(line)]


def loops(code: str) -> tuple[Span, ...]:
    """The innermost loops of a kernel that multiply matrices, in order of the code.

    Loops without products inside of such a loop do not count as innermost: a copy of
    rows at the end of a walk is one. A kernel without a loop has one span, its code.
    """
    lines = bundle_lines(code)
    found: list[_Loop] = [_Loop(0, 0)]
    open_ = [found[0]]
    depth = 0
    for at, line in enumerate(lines):
        match = BUNDLE.match(line)
        assert match
        mark, nesting, instructions = match.groups()
        # A bundle that only waits shows no nesting.
        waits = instructions.startswith("}")
        depth = depth if waits else len(nesting)
        while open_[-1].depth > depth:
            open_.pop()
        if mark in ("LB", "LH") and depth:
            if open_[-1].depth == depth:
                open_.pop()
            found.append(_Loop(depth, at))
            open_.append(found[-1])
        for loop in open_:
            loop.last = at
        if "= vmatmul" in line:
            open_[-1].own = True
            for loop in open_[:-1]:
                loop.inside = True
    kept = [x for x in found if x.own and not x.inside]
    return tuple(_span(lines, x.first, x.last) for x in kept)


@dataclass
class _Loop:
    depth: int
    first: int
    last: int = 0
    own: bool = False  # whether products stand in this loop itself
    inside: bool = False  # whether they stand in a loop inside of it


def regions(code: str) -> tuple[Span, ...]:
    """Stretches of code with products, for kernels of any structure.

    The lines that use the matrix unit or fetch its results are taken together where
    at most ``GAP`` bundles lie between two of them; shorter stretches than ``SHORTEST``
    are left out. This is how other kernels are compared with ours: some have one loop
    over the grid, and no loop over tiles.
    """
    lines = bundle_lines(code)
    hits = [at for at, line in enumerate(lines) if MATRIX_LINE.search(line)]
    found: list[list[int]] = []
    for at in hits:
        if found and at - found[-1][-1] <= GAP:
            found[-1][-1] = at
        else:
            found.append([at, at])
    return tuple(
        _span(lines, first, last) for first, last in found if last - first > SHORTEST
    )


def spills(code: str) -> int:
    """Bundles that write a spilled register or read it back."""
    return sum("spill" in line for line in bundle_lines(code))


def allocated(converted: str) -> dict[str, int]:
    """Bytes of "vmem" and "smem", from the file "post-delay-converter" of a kernel."""
    used = {"vmem": 0, "smem": 0}
    for space, *numbers in ALLOCATION.findall(converted):
        used[space] = max(used[space], sum(int(x, 0) for x in numbers))
    return used


def busy_slots(utilization: str) -> UnitSlots:
    """Reads the file "final_hlo-static-per-bundle-utilization" of a kernel."""
    lines = utilization.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("==")]
    if len(starts) != 2:
        return UnitSlots()
    units, capacity = lines[starts[0] + 1 : starts[0] + 3]
    rows = (line.split() for line in lines[starts[1] + 1 :])
    return UnitSlots(
        tuple(x.strip() for x in units.split(",")),
        tuple(int(x) for x in capacity.split()),
        tuple(tuple(int(x) for x in row) for row in rows if row),
    )


def dump_files(dump: Path | Iterable[Path]) -> dict[str, str]:
    """The texts that ``read_kernels`` needs, by file name, from a dump of libtpu.

    ``dump`` is a folder, or those of its files that belong to one program.
    """
    paths = dump.iterdir() if isinstance(dump, Path) else dump
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(paths):
        match = FILE.match(path.name)
        if match and not match[2].startswith(("<", "TLP")):
            found.setdefault(f"{match[1]}-{match[2]}", {})[match[4]] = path
    texts = {}
    for files in found.values():
        if _multiplies(files):
            texts |= {path.name: path.read_text() for path in files.values()}
    return texts


def _multiplies(files: Mapping[str, Path]) -> bool:
    """Whether the files are of a Pallas kernel, or of a fusion with products."""
    schedule = files.get("schedule-analysis_final_bundles")
    if "final_bundles" not in files:
        return False
    if schedule and "tpu_custom_call" in schedule.read_text():
        return True
    return "= vmatmul" in files["final_bundles"].read_text()


def read_kernels(dump: Path | Iterable[Path]) -> tuple[TpuKernel, ...]:
    """The kernels in a dump, or among some of its files, in the order of compilation.

    They are the Pallas kernels, and those fusions of XLA that multiply matrices.
    """
    return kernels_of(dump_files(dump))


def kernels_of(texts: Mapping[str, str]) -> tuple[TpuKernel, ...]:
    """The kernels of the files that ``dump_files`` returns."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for file, text in texts.items():
        match = FILE.match(file)
        assert match
        found.setdefault((match[1], match[2]), {})[match[4]] = text
    return tuple(_kernel(name, files) for (_, name), files in sorted(found.items()))


def _kernel(name: str, files: Mapping[str, str]) -> TpuKernel:
    code = files["final_bundles"]
    lines = bundle_lines(code)
    whole = _span(lines, 0, len(lines) - 1)
    used = files.get("final_hlo-static-per-bundle-utilization", "")
    return TpuKernel(
        name=name,
        code=code,
        loops=loops(code),
        regions=regions(code),
        bundles=whole.bundles,
        matrix_ops=whole.matrix_ops,
        spills=whole.spills,
        busy=busy_slots(used),
        **allocated(files.get("post-delay-converter", "")),
    )


def _span(lines: list[str], first: int, last: int) -> Span:
    inside = lines[first : last + 1]
    return Span(
        first,
        last,
        sum(len(MATRIX_OP.findall(line)) for line in inside),
        sum("spill" in line for line in inside),
    )
