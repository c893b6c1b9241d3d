"""Reads from an optimised HLO what the devices of a program send to each other."""

import re
from dataclasses import dataclass

from lowering.targets.cpu import computations

KINDS = (
    "collective-permute", "all-gather", "all-reduce", "all-to-all", "reduce-scatter",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
# libtpu spreads a collective over fusions that compute meanwhile: each shows it again.
CONTINUED, STARTS = 'chain_id="', '"AsyncCollectiveStart"'
WHILE = re.compile(r" while\(")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
BELOW = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


@dataclass(frozen=True)
class Collective:
    """One operation of a program in which devices send arrays to each other.

    Attributes:
      kind: one of ``KINDS``.
      shapes: of the arrays that a device has afterwards.
      nbytes: of these arrays.
      devices: in a group; 2 for a permute.
      times: how often a call runs it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    devices: int
    times: int = 1

    @property
    def received(self) -> int:
        """The bytes that a device receives in a call.

        A sum over all devices is a scatter of parts and a gather of their sums.
        """
        others, size = self.devices - 1, self.times * self.nbytes
        match self.kind:
            case "collective-permute" | "collective-broadcast":
                return size
            case "all-reduce":
                return 2 * size * others // self.devices
            case "reduce-scatter":
                return size * others
            case _:
                return size * others // self.devices


def collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives of an optimised program, in order of its text.

    Raises:
      ValueError: a loop with collectives has no known number of steps.
    """
    lines = hlo.splitlines()
    spans = computations(lines)
    times = _times(lines, spans)
    found = []
    for name, (first, last) in spans.items():
        if not times.get(name, 0):
            continue
        inside = lines[first : last + 1]
        starts = any(STARTS in line for line in inside)
        for line in inside:
            match = OPERATION.search(line)
            if match and (starts or CONTINUED not in line):
                found.append(_collective(line, match, times[name]))
    return tuple(found)


def received(hlo: str) -> int:
    """The bytes that a device receives in a call of an optimised program."""
    return sum(each.received for each in collectives(hlo))


def _times(lines: list[str], spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """How often a call runs each computation with a collective in it."""
    talks = {
        name: any(OPERATION.search(line) for line in lines[first : last + 1])
        for name, (first, last) in spans.items()
    }
    times: dict[str, int] = {}

    def reaches(name: str) -> bool:
        first, last = spans[name]
        inside = (x for line in lines[first : last + 1] for x in _called(line, spans))
        return talks[name] or any(reaches(x) for x in inside)

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        first, last = spans[name]
        for line in lines[first : last + 1]:
            for called in _called(line, spans):
                if not reaches(called):
                    continue
                steps = _steps(line, lines, spans) if WHILE.search(line) else 1
                visit(called, count * steps)

    for name, (first, _) in spans.items():
        if lines[first].startswith("ENTRY"):
            visit(name, 1)
    return times


def _steps(line: str, lines: list[str], spans: dict[str, tuple[int, int]]) -> int:
    """How often a loop runs.

    libtpu does not write that down. Then it is the limit of the counter, which begins
    at 0 in the loops of ``jax.lax.scan``.
    """
    found = TRIPS.search(line)
    if found:
        return int(found[1])
    named = CONDITION.search(line)
    assert named, f"no condition in {line[:200]!r}"
    first, last = spans[named[1]]
    condition = "\n".join(lines[first : last + 1])
    below = BELOW.search(condition)
    limit = below and re.search(
        rf"%?{re.escape(below[1])} = s32\[\].* constant\((\d+)\)", condition
    )
    if limit is None:
        raise ValueError(
            f"the loop with the condition {named[1]!r} has collectives, and the "
            "program does not say how often it runs: use a loop of known length"
        )
    return int(limit[1])


def _called(line: str, spans: dict[str, tuple[int, int]]) -> list[str]:
    names = (x.strip(" %{}") for m in CALLED.findall(line) for x in m.split(","))
    return [name for name in names if name in spans]


def _collective(line: str, match: re.Match[str], times: int) -> Collective:
    """The operation of a line of HLO."""
    result, kind, start = match.groups()
    arrays = ARRAY.findall(result)
    if start and kind != "all-reduce":
        # A tuple of the arrays sent, those received, and the state of the transfer.
        data = [x for x in arrays if x[2] or x[0] != "u32"]
        arrays = data[len(data) // 2 :]
    shapes = tuple(
        tuple(int(n) for n in sizes.split(",") if n) for _, _, sizes in arrays
    )
    nbytes = 0
    for (_, bits, _), shape in zip(arrays, shapes, strict=True):
        count = 1
        for n in shape:
            count *= n
        nbytes += count * int(bits or 8) // 8
    return Collective(kind, shapes, nbytes, _group(line, kind), times)


def _group(line: str, kind: str) -> int:
    """The number of devices that take part in one group."""
    if kind == "collective-permute":
        return 2
    listed, counted, named = (x.search(line) for x in (LISTED, COUNTED, NAMED))
    if counted:
        return int(counted[1])
    if named:
        # Axes of a mesh, as later versions of jax write them.
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        found = 1
        for axis in re.findall(r"'([^']+)'", named[2]):
            found *= int(sizes[axis])
        return found
    assert listed, f"no groups in {line[:200]!r}"
    return listed[1].count(",") + 1
