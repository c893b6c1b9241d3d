"""Writes ``cab_patterns.md``: which of CAB's four patterns each mechanism supports.

    python docs/cab_patterns.py            # runs every mechanism: seven minutes
    python docs/cab_patterns.py --new      # runs those that have no row yet
    python docs/cab_patterns.py --check    # compares the names of the rows: a second

Nothing is claimed by hand: each cell is what a mechanism does on random content. The
rows are the tables of the tests, in ``tests/cab_cases.py``.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cab_cases  # noqa: E402 - the tests' own module
from cab_cases import Entry  # noqa: E402

PAGE = Path(__file__).parent / "cab_patterns.md"
COLUMNS = "noncausal self", "causal self", "noncausal cross", "causal cross"
# Rounding differs with the length; what a token changes is of the order of one.
TOLERANCE = 1e-4
# How many memory positions there are beside those of the queries, if that works.
LONGER = 7
CUTS, REPEATS = 60, 2

INTRODUCTION = """\
# The four patterns of attention

<!-- Written by docs/cab_patterns.py, which runs every mechanism. Do not edit. -->

Zhang et al., CAB: comprehensive attention benchmarking on long sequence modeling, 2023,
names four patterns that an efficient attention may or may not support. Here each is a
property that is tested on random content, at a small size, with the dense backend:

| pattern | what is tested | cells |
|---|---|---|
| noncausal self | the call works on one sequence, and some output depends on a later token | `yes`; `past only` |
| causal self | no output depends on a later token | `yes`; `choice`: later tokens change which keys are chosen or how they weigh, but no later value is read; `no` |
| noncausal cross | the call works with queries and keys of two sequences, and some query sees a memory position beyond its own number | `yes`; `past only`; with `=` if only where both have one length |
| causal cross | an output is the same when later *queries* are cut off; all memory stays | `yes`; `no`; with `=` as above |

`-` means that the call is refused with an error. What needs as many queries as keys, or
some queries to choose by, refuses shorter queries and so is `-` as causal cross.

A spec is one pattern or another; a mechanism often has a spec for each. `causal() & m` is
causal self wherever the choice of `m` does not look ahead.
"""  # noqa: E501 - rows of a table


class Content(NamedTuple):
    """Inputs ``[batch, seq, heads, head_dim]``, float32."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def run(entry: Entry, x: Content) -> np.ndarray | None:
    """The output of an entry; None if the call is refused."""
    try:
        given = {name: _narrow(y) for name, y in entry.operands(x.q, x.k).items()}
        out = jax.jit(entry.attend)(*x, given)
    except (ValueError, NotImplementedError):
        return None
    assert np.isfinite(out).all(), entry.name
    return np.asarray(out)


def _narrow(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == np.float64 else x


def drawn(entry: Entry, q_len: int, kv_len: int, seed: int) -> Content:
    """Random content of one batch entry."""
    rng = np.random.default_rng(seed)
    sizes = q_len, kv_len, kv_len
    shapes = [(1, n, entry.num_heads, entry.head_dim) for n in sizes]
    return Content(*(rng.normal(size=s).astype(np.float32) for s in shapes))


def cuts_of(n: int) -> np.ndarray:
    """At which positions a sequence is cut: all, or ``CUTS`` of them, evenly."""
    return np.unique(np.linspace(1, n - 1, min(n - 1, CUTS)).astype(int))


def replaced(old: Content, new: Content, cuts: np.ndarray, names: str) -> Content:
    """A batch: for each cut, ``old`` with the named arrays ``new`` from there on."""

    def mixed(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        after = np.arange(x.shape[1]) >= cuts[:, None]
        whole = np.broadcast_to(x, (len(cuts), *x.shape[1:]))
        return np.where(after[..., None, None], y, whole) if name in names else whole

    pairs = zip(old._fields, old, new, strict=True)
    return Content(*(mixed(name, x, y) for name, x, y in pairs))


def depends(entry: Entry, kv_len: int, names: str) -> bool | None:
    """Whether an output changes with the named arrays at later positions.

    None if the call is refused. No change on random content is no proof.
    """
    for repeat in range(REPEATS):
        old, new = (drawn(entry, entry.n, kv_len, 2 * repeat + x) for x in (0, 1))
        found = _changes(entry, old, new, names)
        if found is None or found:
            return found
    return False


def _changes(entry: Entry, old: Content, new: Content, names: str) -> bool | None:
    cuts = cuts_of(min(old.q.shape[1], old.k.shape[1]))
    # The last cut is behind the end: nothing is replaced there.
    batch = replaced(old, new, np.append(cuts, old.k.shape[1] + 1), names)
    out = run(entry, batch)
    if out is None:
        return None
    scale = np.abs(out).max()
    changed = np.abs(out[:-1] - out[-1:]).max(axis=(2, 3)) > TOLERANCE * scale
    return bool((changed & (np.arange(out.shape[1]) < cuts[:, None])).any())


def self_patterns(entry: Entry) -> tuple[str, str]:
    """The cells of both self patterns."""
    # A sequence is its own memory: a later token changes q, k and v there.
    found = depends(entry, entry.n, "qkv")
    if found is None:
        return "-", "-"
    if not found:
        return "past only", "yes"
    read = depends(entry, entry.n, "v")
    return "yes", "no" if read else "choice"


def cross_patterns(entry: Entry) -> tuple[str, str]:
    """The cells of both cross patterns."""
    for more, mark in ((LONGER, ""), (0, " =")):
        found = depends(entry, entry.n + more, "kv")
        if found is not None:
            cut = _cut(entry, drawn(entry, entry.n, entry.n + more, 0))
            sees = "yes" if found else "past only"
            return sees + mark, cut if cut == "-" else cut + mark
    return "-", "-"


def _cut(entry: Entry, x: Content) -> str:
    """Whether outputs stay the same without the later queries."""
    whole = run(entry, x)
    assert whole is not None
    cells = []
    for cut in (1, entry.n // 2 + 1, entry.n - 1):
        part = run(entry, x._replace(q=x.q[:, :cut]))
        if part is None:
            cells.append("-")
            continue
        error = np.abs(part - whole[:, :cut]).max() / np.abs(whole).max()
        cells.append("yes" if error <= TOLERANCE else "no")
    # What works for some lengths only is not supported.
    return next((x for x in ("-", "no") if x in cells), "yes")


def patterns(entry: Entry) -> tuple[str, ...]:
    """The four cells of a row."""
    return (*self_patterns(entry), *cross_patterns(entry))


# ---- the page


def page(cells_of: Callable[[Entry], tuple[str, ...]]) -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for title, entries in cab_cases.tables().items():
        lines += [f"## {title}", "", f"| | {' | '.join(COLUMNS)} |"]
        lines.append(f"|---|{':-:|' * len(COLUMNS)}")
        for entry in entries:
            lines.append(f"| {entry.name} | {' | '.join(cells_of(entry))} |")
        lines.append("")
    said = (f"{name} ({text})" for name, text in cab_cases.NO_ATTENTION.items())
    return "\n".join([*lines, f"No attention of their own: {', '.join(said)}.", ""])


def written() -> dict[str, tuple[str, ...]]:
    """The cells of the page as it is, by the name of the row."""
    return dict(_rows(PAGE.read_text()))


def _rows(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for line in text.splitlines():
        name, *cells = (x.strip() for x in line.strip("| ").split(" | "))
        if len(cells) == len(COLUMNS) and not line.startswith("| |"):
            yield name, tuple(cells)


def current() -> bool:
    """Whether the page has the rows of today's tests, in their order."""
    old = written()
    return PAGE.read_text() == page(lambda x: old.get(x.name, ("",) * len(COLUMNS)))


def main() -> int:
    """Writes the page, or says whether it is current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--new", action="store_true", help="keep the rows that exist")
    args = parser.parse_args()
    if args.check:
        if current():
            return 0
        print(f"{PAGE} has not the rows of the tests: run python {Path(__file__).name}")
        return 1
    old = written() if args.new else {}
    PAGE.write_text(page(lambda x: old.get(x.name) or patterns(x)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
