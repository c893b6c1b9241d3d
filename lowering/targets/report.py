"""What a compiler has made of a call: figures as text, dict and HTML; marked code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# The width of the margin that says to which loop a line of code belongs.
MARGIN = 14


@dataclass(frozen=True)
class ReportTable:
    """A table of text cells; the first column holds names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [
            max(len(cell) for cell in column) for column in zip(*lines, strict=True)
        ]
        text = [self.title]
        for name, *cells in lines:
            numbers = (
                f"  {cell:>{width}}"
                for cell, width in zip(cells, widths[1:], strict=True)
            )
            text.append(f"{name:<{widths[0]}}{''.join(numbers)}".rstrip())
        return "\n".join(text)


@dataclass(frozen=True)
class LoopFigures:
    """Figures of one loop of a kernel: of the code that one tile or one step runs.

    ``first`` and ``last`` are lines of the code of the kernel, both inclusive.
    """

    name: str
    first: int
    last: int
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class KernelFigures:
    """Figures of one kernel, its loops, and its code."""

    name: str
    figures: Mapping[str, Any]
    loops: tuple[LoopFigures, ...]
    code: str

    def marked(self, *, hot: bool = False) -> str:
        """The code with a margin that names the loop of each line.

        ``hot`` leaves out everything but the loops.
        """
        names = {}
        for loop in self.loops:
            for at in range(loop.first, loop.last + 1):
                names.setdefault(at, loop.name)
        lines = [
            f"{names.get(at, ''):<{MARGIN}}| {line}".rstrip()
            for at, line in enumerate(self.code.splitlines())
            if at in names or not hot
        ]
        return "\n".join([f"-- {self.name}", *lines])


@dataclass(frozen=True, repr=False)
class Report:
    """The figures of a compiled call.

    ``print`` shows aligned text, ``as_dict`` gives what JSON can hold, and a notebook
    shows HTML tables.

    Attributes:
      target: the name of the chip, or "cpu".
      facts: figures of the whole program, by name.
      kernels: the kernels in the order of their compilation.
      notes: what these figures leave out, and why.
    """

    target: str
    facts: Mapping[str, Any]
    kernels: tuple[KernelFigures, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, without the code."""
        return {
            "target": self.target,
            **self.facts,
            "kernels": [
                {
                    "name": kernel.name,
                    **kernel.figures,
                    "loops": [{"name": x.name, **x.figures} for x in kernel.loops],
                }
                for kernel in self.kernels
            ],
            "notes": list(self.notes),
        }

    def tables(self) -> tuple[ReportTable, ...]:
        """A table of the kernels, and one of their loops."""
        kernels = [(x.name, x.figures) for x in self.kernels]
        loops = [
            (f"{kernel.name}, {loop.name}", loop.figures)
            for kernel in self.kernels
            for loop in kernel.loops
        ]
        found = [("kernels", kernels), ("loops with products", loops)]
        return tuple(_table(title, rows) for title, rows in found if rows)

    def __str__(self) -> str:
        facts = [("target", self.target), *self.facts.items()]
        width = 2 + max(len(name) for name, _ in facts)
        head = "\n".join(f"{name:<{width}}{_cell_text(x)}" for name, x in facts)
        notes = [f"note: {note}" for note in self.notes]
        return "\n\n".join([head, *map(str, self.tables()), *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        facts = [("target", self.target), *self.facts.items()]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return html_page([(n, _cell_text(x)) for n, x in facts], self.tables()) + notes


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> ReportTable:
    names = list(dict.fromkeys(name for _, figures in rows for name in figures))
    lines = tuple(
        (row, *(_cell_text(figures.get(name)) for name in names))
        for row, figures in rows
    )
    return ReportTable(title, ("", *names), lines)


def _cell_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}"
    if isinstance(value, Mapping):
        return " ".join(f"{n} {_cell_text(x)}" for n, x in value.items()) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- HTML ---

# These styles inherit the colours of the page, so they work on light and dark pages.
_TABLE = "border-collapse: collapse; margin: 0 0 0.8em 0"
_LINE = "border-bottom: 1px solid color-mix(in srgb, currentColor 40%, transparent)"


def html_page(facts: Iterable[tuple[str, str]], tables: Iterable[ReportTable]) -> str:
    """Facts and tables as HTML for a notebook."""
    rows = "".join(
        f"<tr>{_cell('th', name, 'left')}{_cell('td', value, 'left')}</tr>"
        for name, value in facts
    )
    parts = [_html(rows), *map(_html_table, tables)]
    return f'<div style="font-size: 90%">{"".join(parts)}</div>'


def _cell(tag: str, text: str, align: str, style: str = "") -> str:
    whole = f"text-align: {align}; padding: 0.1em 0.7em; {style}".rstrip()
    return f'<{tag} style="{whole}">{escape(text)}</{tag}>'


def _html(rows: str, title: str = "") -> str:
    caption = (
        f'<caption style="text-align: left; padding: 0.2em 0.7em"><b>{escape(title)}'
        "</b></caption>"
        if title
        else ""
    )
    return f'<table style="{_TABLE}">{caption}{rows}</table>'


def _html_table(table: ReportTable) -> str:
    def line(cells: tuple[str, ...], head: bool) -> str:
        style = _LINE if head else ""
        tag = "th" if head else "td"
        first, *rest = cells
        numbers = "".join(_cell(tag, cell, "right", style) for cell in rest)
        return f"<tr>{_cell('th', first, 'left', style)}{numbers}</tr>"

    rows = [line(table.header, True), *(line(row, False) for row in table.rows)]
    return _html("".join(rows), table.title)
