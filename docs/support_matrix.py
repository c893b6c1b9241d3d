"""Writes ``support_matrix.md``: which mechanism works on which backend.

    python docs/support_matrix.py            # traces all rows: some minutes
    python docs/support_matrix.py --check    # compares what is tested: seconds

Nothing is claimed by hand. The rows are the tables of the tests. A letter is there if
JAX traces that transformation of the call; no kernel runs. It is bold if a test
compares the result with a definition: the test's own parameters say on which backends.
"""

import argparse
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import calls  # noqa: E402 - the tests' own modules
import content_cases  # noqa: E402
import kernel_cases  # noqa: E402
import published  # noqa: E402

import sadsl as sa  # noqa: E402

PAGE = Path(__file__).parent / "support_matrix.md"
BACKENDS = calls.IMPLS
LETTERS = "FBJ2"
# What stands in a cell for a transformation that is refused.
REFUSED = "-"

INTRODUCTION = """\
# What works on which backend

<!-- Written by docs/support_matrix.py from the tables of the tests. Do not edit. -->

| letter | meaning |
|---|---|
| F | the forward pass |
| B | gradients by `jax.grad` of queries, keys, values and learned arrays |
| J | forward mode, `jax.jvp` |
| 2 | second derivatives, `jax.grad` of `jax.grad` |

A letter is **bold** where a test compares the result of this row on this backend with
a definition, in float64 or by the dense `"reference"`. A letter that is not bold says
that JAX accepts the call under that transformation, and that no test of this table
compares it. `-` means that the call is refused with an error.

The kernels see of each mechanism only a plan, bits and vectors; the tests of the first
table, and `tests/sadsl/selections/test_content.py`, compare these on every backend.

The `"tpu"` and `"triton"` kernels are tested in Pallas' interpreter; none has run on a
TPU or a GPU yet. Their second derivatives go through a dense twin, in quadratic memory.
`tests/sadsl/run/test_jvp.py` holds J and 2 for maps, run-time plans and sorted
positions against finite differences and against `"reference"`. {doc}`decoding` says
which rows decode, and what their caches keep.
"""


@dataclass(frozen=True)
class Row:
    """A call: a spec with the arrays that it needs."""

    name: str
    spec: Any
    shapes: tuple[tuple[int, ...], ...]
    learned: Mapping[str, Any] = field(default_factory=dict)
    operands: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def module(path: str) -> ModuleType:
    """A test file, imported by its path."""
    name = re.sub(r"\W", "_", path)
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# ---- rows: the tables of the tests


def terms(tests: ModuleType) -> Iterator[Row]:
    """Every kind of term with its arrays, from ``test_float64.py``."""
    rng = np.random.default_rng(0)
    heads = tests.HEADS, tests.KV_HEADS, tests.KV_HEADS
    shapes = tuple((2, tests.N, h, tests.DIM) for h in heads)
    for name, case in tests.CASES.items():
        learned = {
            x: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for x, shape in case.floats.items()
        }
        options = {x: jnp.asarray(ids) for x, ids in case.integers.items()}
        if case.rate:
            options |= {"dropout_rate": case.rate, "dropout_key": jax.random.key(1)}
        yield Row(name, case.spec, shapes, learned, options=options)


def static(tests: ModuleType) -> Iterator[Row]:
    """The mechanisms that positions decide, from ``published.py``."""
    for case in tests.CASES:
        size = case.sizes[1]
        shape = 1, case.length(size), case.heads, 8
        yield Row(case.name, case.make(size), (shape,) * 3)


def by_content(tests: ModuleType) -> Iterator[Row]:
    """The mechanisms that content decides, from ``content_cases.py``."""
    for name, case in tests.CASES.items():
        shape = 2, case.n, case.num_heads, case.head_dim
        q, k = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        operands = {x: jnp.asarray(y) for x, y in case.operands(q, k).items()}
        yield Row(name, case.spec, (shape,) * 3, operands=operands)


# ---- letters: what JAX traces


def accepted(row: Row, impl: str) -> str:
    """The letters of the transformations that trace on a backend."""

    def loss(q: Any, k: Any, v: Any, learned: Any) -> jax.Array:
        out = sa.attention(
            q, k, v, row.spec, impl=impl, operands={**row.operands, **learned},
            **row.options, **calls.BACKENDS[impl],
        )  # fmt: skip
        return jnp.sum(jnp.square(out))

    every = 0, 1, 2, 3
    slope = jax.grad(loss, every)

    def second(*x: Any) -> Any:
        total = lambda *y: sum(jnp.sum(z) for z in jax.tree.leaves(slope(*y)))
        return jax.grad(total, every)(*x)

    ways: dict[str, Callable[..., Any]] = {
        "F": loss, "B": slope, "J": lambda *x: jax.jvp(loss, x, x), "2": second,
    }  # fmt: skip
    arrays = *(jnp.zeros(shape, jnp.float32) for shape in row.shapes), row.learned
    traces = {letter: _traces(ways[letter], arrays) for letter in "J2"}
    # Whatever has second derivatives has first ones.
    for letter in "FB":
        traces[letter] = traces["2"] or _traces(ways[letter], arrays)
    return "".join(x for x in LETTERS if traces[x])


def _traces(f: Callable[..., Any], arrays: tuple[Any, ...]) -> bool:
    """Whether a function traces, and nothing is left that only reverse mode has."""
    try:
        program = jax.make_jaxpr(f)(*arrays)
    except (NotImplementedError, TypeError):
        return False
    # Forward mode of a custom_vjp traces, and fails when it is compiled.
    return "custom_lin" not in _primitives(program.jaxpr)


def _primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives in a program and in those within it."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves([*equation.params.values()]):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= _primitives(inner)
    return found


# ---- bold letters: what tests compare


def tested(tests: ModuleType, names: list[str]) -> dict[tuple[str, str], str]:
    """Letters by row and backend that a test of this file holds against a definition.

    A test counts if one of its parameters goes through rows of the table, and if it
    ends in ``assert_close``, of ``oracle`` or its own.
    """
    found: dict[tuple[str, str], str] = {}
    for test in vars(tests).values():
        if not isinstance(test, FunctionType) or not test.__name__.startswith("test_"):
            continue
        said = _words(test, tests)
        if "assert_close" not in said or "raises" in said:
            continue
        given = _parameters(test)
        rows = [x for values in given.values() for x in values if x in names]
        letters = "FB" if said & {"vjp", "grad", "value_and_grad"} else "F"
        for impl in given.get("impl") or _literal(test):
            found |= {(name, impl): letters for name in rows}
    return found


def _parameters(test: FunctionType) -> dict[str, list[str]]:
    """The values that a test is called with, cases by their names."""
    found: dict[str, list[str]] = {}
    for mark in getattr(test, "pytestmark", ()):
        if mark.name != "parametrize" or not isinstance(mark.args[0], str):
            continue
        values = [getattr(x, "values", x) for x in mark.args[1]]
        values = [x[0] if type(x) is tuple and x else x for x in values]
        found[mark.args[0]] = [str(getattr(x, "name", x)) for x in values]
    return found


def _literal(test: FunctionType) -> list[str]:
    """The backends that a test names itself."""
    return [x for x in BACKENDS if f'"{x}"' in inspect.getsource(test)]


def _words(test: FunctionType, tests: ModuleType) -> set[str]:
    """Every name that a test uses, also in the functions of its file that it calls."""
    found, todo = set(), [test.__code__]
    while todo:
        code = todo.pop()
        new = {*code.co_names, *code.co_freevars} - found
        found |= new
        todo += [x for x in code.co_consts if hasattr(x, "co_names")]
        own = [vars(tests).get(x) for x in new]
        todo += [x.__code__ for x in own if isinstance(x, FunctionType)]
    return found


# ---- the page


@dataclass(frozen=True)
class Table:
    """A table of the tests: what makes its rows, and the tests that go through it."""

    title: str
    text: str
    rows: Callable[[], Iterator[Row]]
    tests: ModuleType


def tables() -> list[Table]:
    """All tables, in the order of the page."""
    wide = module("tests/sadsl/run/test_float64.py")
    return [
        Table(
            "Maps and terms",
            "The table of `tests/sadsl/run/test_float64.py`.",
            lambda: terms(wide),
            wide,
        ),
        Table(
            "Mechanisms that positions decide",
            "The table of `tests/published.py`: each mechanism is also compared, pair "
            "by pair, with a loop written from its paper.",
            lambda: static(published),
            module("tests/sadsl/catalog/test_catalog.py"),
        ),
        Table(
            "Mechanisms that content decides",
            "The table of `tests/content_cases.py`. The choice has no gradient.",
            lambda: by_content(content_cases),
            module("tests/sadsl/catalog/test_mechanisms.py"),
        ),
    ]


def kernels() -> list[str]:
    """What every kernel is tested with, from ``kernel_cases.py``."""
    cases = kernel_cases.table()
    files = {x: f"tests/pallas_kernels/{x}/test_{x}.py" for x in BACKENDS[1:]}
    for impl, path in files.items():
        assert f'case.check("{impl}"' in (ROOT / path).read_text(), path

    def listed(values: set[Any]) -> str:
        return ", ".join(f"`{x}`" for x in sorted(values))

    rows = {
        "patterns": listed({case.pattern.name for case in cases}),
        "dtypes": listed({case.dtype for case in cases}),
        "query heads / key heads": listed({f"{c.q_heads}/{c.kv_heads}" for c in cases}),
        "queries x keys": listed({f"{c.q_len}x{c.kv_len}" for c in cases}),
        "`head_dim`/`head_dim_v`": listed({f"{c.dim}/{c.dim_v}" for c in cases}),
        "soft cap": listed({str(c.soft_cap) for c in cases}),
    }
    named = ", ".join(f'`"{x}"`' for x in files)
    return [
        "## Kernels",
        "",
        f"The {len(cases)} cases of `tests/kernel_cases.py`: values, log-sum-exp and "
        f"gradients of each, against float64, on {named}.",
        "",
        "| | tested |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows.items()),
    ]


def cell(letters: str, bold: str) -> str:
    """The letters of a cell, those in ``bold`` as such: ``**F** **B** J -``."""
    parts = [
        REFUSED if x not in letters else f"**{x}**" if x in bold else x for x in LETTERS
    ]
    return " ".join(parts)


def page(letters_of: Callable[[Table, Row, str], str]) -> str:
    """The whole page; ``letters_of`` says what is accepted."""
    lines = [INTRODUCTION]
    for table in tables():
        rows = list(table.rows())
        bold = tested(table.tests, [row.name for row in rows])
        lines += [f"## {table.title}", "", table.text, ""]
        lines += [f"| | {' | '.join(BACKENDS)} |", f"|---|{':-:|' * len(BACKENDS)}"]
        for row in rows:
            cells = [
                cell(letters_of(table, row, x), bold.get((row.name, x), ""))
                for x in BACKENDS
            ]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *kernels(), ""])


def written() -> dict[tuple[str, str, str], str]:
    """The letters of the page as it is, by table, row and backend."""
    found, title = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            title = line[3:]
        parts = [x.strip() for x in line.strip("|").split(" | ")]
        if len(parts) == len(BACKENDS) + 1:
            for impl, text in zip(BACKENDS, parts[1:], strict=True):
                found[title, parts[0], impl] = re.sub(r"[^FBJ2]", "", text)
    return found


def current() -> bool:
    """Whether the page has the rows and the bold letters of today's tests."""
    old = written()
    return PAGE.read_text() == page(
        lambda table, row, impl: old.get((table.title, row.name, impl), "")
    )


def main() -> int:
    """Writes the page, or says whether it is current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if parser.parse_args().check:
        if current():
            return 0
        print(f"{PAGE} is not what the tests say: run python {Path(__file__).name}")
        return 1
    PAGE.write_text(page(lambda table, row, impl: accepted(row, impl)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
