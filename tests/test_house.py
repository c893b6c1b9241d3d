"""The rules of the source tree that no linter knows; CONTRIBUTING explains them."""

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict
from pathlib import Path

import pytest

import sadsl
from sadsl.maps.base import IndexMap
from sadsl.run.attend import attend, choose
from sadsl.run.options import Options
from sadsl.terms.base import Term

ROOT = Path(sadsl.__file__).parent.parent
FLOORS = "sadsl", "lowering", "pallas_kernels"
# Flax has two APIs, and layers bear one name in both.
TWINS = {
    Path("sadsl/layers") / f"{prefix}{api}.py"
    for prefix in ("", "sparse_", "linear_", "indexed_")
    for api in ("linen", "nnx")
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_KERNEL = 400, 60, 120


def sources(*folders):
    """The Python files below some folders, relative to the root, and their syntax."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield path.relative_to(ROOT), tree


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_a_class_name_is_defined_once():
    found = defaultdict(set)
    for path, tree in sources(*FLOORS):
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].add(path)
    twice = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert {name: p for name, p in twice.items() if not p <= TWINS} == {}


def test_files_and_functions_are_short():
    long = []
    for path, tree in sources(*FLOORS, "tests", "benchmarks", "examples"):
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        if lines > MOST_LINES:
            long.append(f"{path}: {lines} lines")
        if path.parts[0] not in FLOORS:
            continue
        kernels = path.parts[0] == "pallas_kernels"
        most = MOST_LINES_OF_A_KERNEL if kernels else MOST_LINES_OF_A_FUNCTION
        for node in functions(tree):
            size = node.end_lineno - node.lineno + 1
            if size > most:
                long.append(f"{path}:{node.lineno}: {node.name} has {size} lines")
    assert long == []


def test_imports_stand_at_the_top():
    inside = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*FLOORS)
        for function in functions(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


def test_no_import_is_optional():
    """Nothing falls back in silence where a package is not installed."""
    caught = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*FLOORS)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is not None
        if "ImportError" in ast.unparse(node.type)
    ]
    assert caught == []


def test_every_name_at_the_top_is_used():
    """What nobody names, in the package or its tests, goes."""
    used, defined = defaultdict(int), {}
    for path, tree in sources(*FLOORS, "tests", "benchmarks", "examples"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                used[node.id] += 1
            elif isinstance(node, ast.Attribute):
                used[node.attr] += 1
            elif isinstance(node, ast.alias):
                used[node.asname or node.name] += path.name != "__init__.py"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used[node.value] += 1
        if path.parts[0] in FLOORS:
            # A decorator such as ``take.defjvp`` may be all that needs a function.
            for node in tree.body:
                decorated = bool(getattr(node, "decorator_list", None))
                function = isinstance(node, ast.FunctionDef) and not decorated
                if function or isinstance(node, ast.ClassDef):
                    defined[node.name] = f"{path}:{node.lineno}"
    defined.pop("__dir__")
    assert {place for name, place in defined.items() if not used[name]} == set()


# --- documents ---


@pytest.mark.parametrize("name", ["", ".catalog", ".selections", ".layers"])
def test_public_functions_have_an_example(name):
    """Each docstring has code that the tests run, or says where it stands."""
    package = importlib.import_module(f"sadsl{name}")
    functions = [
        value
        for key, value in vars(package).items()
        if inspect.isfunction(value) and not key.startswith("_")
        if value.__module__.startswith("sadsl.")
    ]
    bare = [
        f.__name__
        for f in functions
        if ">>>" not in (f.__doc__ or "")
        and "see there for an example" not in (f.__doc__ or "")
    ]
    assert bare == []


# --- running a term ---


def concrete_terms():
    """The classes of terms that a spec can hold."""
    for module in pkgutil.walk_packages(sadsl.__path__, "sadsl."):
        importlib.import_module(module.name)
    every, todo = [], [Term]
    while todo:
        cls = todo.pop()
        below = [c for c in cls.__subclasses__() if c.__module__.startswith("sadsl.")]
        todo += below
        if not below:
            every.append(cls)
    return sorted(every, key=lambda cls: cls.__name__)


def test_every_term_registers_its_rule():
    """``attend`` is one singledispatch function; a new term is one file of ``run``."""
    fallback = attend.dispatch(object)
    terms = concrete_terms()
    assert len(terms) > 8
    for cls in (*terms, IndexMap):
        rule = attend.dispatch(cls)
        assert rule is not fallback, f"{cls} has no rule in sadsl/run"
        assert rule.__module__.startswith("sadsl.run."), cls


def test_rules_take_the_same_parameters():
    for function in (attend, choose):
        wanted = list(inspect.signature(function).parameters)
        for rule in function.registry.values():
            assert list(inspect.signature(rule).parameters) == wanted


def test_terms_are_values():
    """What runs a term stands in ``run``: no method of a term takes arrays."""
    for cls in concrete_terms():
        assert not hasattr(cls, "attend")
        assert cls.__module__.startswith("sadsl.terms."), cls


def test_one_frozen_value_travels_with_a_call():
    assert list(Options.__dataclass_fields__) == ["term", "problem", "setting"]
    assert Options.__dataclass_params__.frozen


# --- tests ---


@pytest.mark.parametrize("floor", FLOORS)
def test_tests_mirror_the_sources(floor):
    """A folder of tests has the name of the folder that it tests."""
    for path, _ in sources(f"tests/{floor}"):
        assert (ROOT / path.parent.relative_to("tests")).is_dir(), path
