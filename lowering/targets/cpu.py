"""Reads the optimised HLO of a program for CPUs: its hot loops and their fusions."""

import re
from dataclasses import dataclass

HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
PRODUCT = re.compile(r" (?:dot|convolution)\(")
FUSION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? (?:fusion|custom-call|call)\(")


@dataclass(frozen=True)
class HloLoop:
    """A computation that multiplies matrices: the body of a loop, or the entry.

    ``first`` and ``last`` are lines of the text, both inclusive. ``products`` counts
    those of its fusions too.
    """

    name: str
    first: int
    last: int
    fusions: tuple[str, ...]
    products: int


def hot_loops(hlo: str) -> tuple[HloLoop, ...]:
    """The innermost loops with products, in order of the text.

    A program without such a loop has the entry instead, if it has products.
    """
    lines = hlo.splitlines()
    spans = computations(lines)
    bodies = {m[1] for line in lines if (m := BODY.search(line))}

    def products(name: str, loops: bool) -> int:
        """Products of a computation and of what it calls, perhaps also of loops."""
        first, last = spans[name]
        total = 0
        for line in lines[first : last + 1]:
            total += bool(PRODUCT.search(line))
            for called in CALLED.findall(line):
                if called in spans and (loops or called not in bodies):
                    total += products(called, loops)
        return total

    inner = [
        name
        for name in bodies & set(spans)
        if products(name, True) and products(name, True) == products(name, False)
    ]
    entry = [name for name, (first, _) in spans.items() if "ENTRY" in lines[first]]
    named = inner or [name for name in entry if products(name, True)]
    found = [
        HloLoop(name, *spans[name], _fusions(lines, *spans[name]), products(name, True))
        for name in named
    ]
    return tuple(sorted(found, key=lambda loop: loop.first))


def computations(lines: list[str]) -> dict[str, tuple[int, int]]:
    """The first and the last line of each computation of an HLO."""
    found: dict[str, tuple[int, int]] = {}
    name, start = "", 0
    for at, line in enumerate(lines):
        match = HEADER.match(line)
        if match:
            name, start = match[1], at
        elif line.startswith("}") and name:
            found[name] = start, at
            name = ""
    return found


def _fusions(lines: list[str], first: int, last: int) -> tuple[str, ...]:
    inside = lines[first : last + 1]
    return tuple(m[1] for line in inside if (m := FUSION.match(line)))
