"""Writes ``decoding.md``: what a cache of each mechanism keeps.

    python docs/decoding.py            # makes the caches of all rows: a minute
    python docs/decoding.py --check    # compares them with the page

The rows are the table of ``tests/cab_cases.py``, which ``tests/sadsl/decode/
test_catalogue.py`` decodes in pieces and token by token, and compares with whole calls.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cab_cases  # noqa: E402 - the tests' own module

import sadsl as sa  # noqa: E402

PAGE = Path(__file__).parent / "decoding.md"
# Words of the errors of ``init_cache``, and what the page says.
REASONS = {
    "not causal": "not causal",
    "blocks of later tokens": "not causal",
    "depends on the length: in": "depends on the length",
    "several queries at once": "chooses for several queries at once",
    "(leak": "the choice depends on later tokens",
    "positions alone": "content decides the regions",
    "more of earlier tokens": "needs more of earlier tokens than a cache keeps",
}
INTRODUCTION = """\
# What a cache keeps

<!-- Written by docs/decoding.py from the table of the tests. Do not edit. -->

The mechanisms of the table in `tests/cab_cases.py`, at its small sizes: the slots of
the keys, of so many positions, and what else is kept. Each row that is decoded equals
the rows of the whole call (`tests/sadsl/decode/test_catalogue.py`). `init_cache`
refuses the others, and its error names the spec and the way out.
"""


def kept(entry: Any) -> str:
    """What the cache of an entry keeps, or why there is none."""
    rng = np.random.default_rng(1)
    shape = 2, entry.n, entry.num_heads, entry.head_dim
    q, k = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    given = dict(entry.operands(q, k))
    try:
        cache = sa.init_cache(entry.spec, 2, entry.n, *shape[2:], operands=given)
    except (ValueError, NotImplementedError) as error:
        (why,) = (short for words, short in REASONS.items() if words in str(error))
        return f"refused: {why}"
    slots = cache.layout.slots
    parts = [] if slots is None else [_slots(slots)]
    names = {type(x).__name__ for x in _states(cache.states)}
    words = {
        "LinearState": "a recurrent state",
        "EntryStore": "pooled blocks",
        "RegionStore": "all tokens and regions",
    }
    parts += [words[name] for name in sorted(names)]
    parts += [f"`{name}`" for name, _ in cache.layout.axes if name.isidentifier()]
    if any(not name.isidentifier() for name, _ in cache.layout.axes):
        parts.append("a label for each key")
    return ", ".join(parts)


def _slots(slots: Any) -> str:
    if slots.hold_all:
        return f"all {slots.length} keys"
    ring = f"a ring of {slots.ring} of {slots.length}"
    return f"{slots.pinned} keys for good, {ring}" if slots.pinned else ring


def _states(states: Any) -> Iterator[Any]:
    """The states of all parts."""
    if type(states) is tuple:
        for each in states:
            yield from _states(each)
    elif states is not None:
        yield states


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for title, entries in cab_cases.tables().items():
        rows = [entry for entry in entries if entry.spec is not None]
        lines += [f"## {title}", "", "| | cache |", "|---|---|"]
        lines += [f"| {entry.name} | {kept(entry)} |" for entry in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Writes the page, or says whether it is current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print(f"{PAGE} is not what the tests say: run python docs/{Path(__file__).name}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
