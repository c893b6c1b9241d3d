"""What ``import sadsl`` gives: the public names, and no more than they need."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import sadsl
from sadsl import catalog, layers

ROOT = pathlib.Path(sadsl.__file__).parent
FLOORS = [ROOT, ROOT.parent / "lowering", ROOT.parent / "pallas_kernels"]


def run(code):
    """What a fresh interpreter prints, line by line."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_loads_only_what_it_needs():
    found = run("import sys, sadsl; print(*sys.modules)")
    for name in ("sadsl.catalog", "sadsl.layers", "sadsl.plot", "flax", "matplotlib"):
        assert name not in found


EVERY_MODULE = """
import importlib, pkgutil, sadsl
for module in pkgutil.walk_packages(sadsl.__path__, "sadsl."):
    importlib.import_module(module.name)
import sadsl.catalog, sadsl.layers, sadsl.plot
for package in (sadsl, sadsl.catalog, sadsl.layers):
    for name, value in vars(package).items():
        if not name.startswith("_"):
            defined = getattr(value, "__module__", "-")
            print(f"{package.__name__}:{name}:{type(value).__name__}:{defined}")
"""


def test_exports_are_what_their_modules_define():
    """After any import: a module of an export's name takes its place when it loads."""
    found = {}
    for line in run(EVERY_MODULE):
        package, name, kind, module = line.split(":")
        found[package, name] = kind, module
    packages = sadsl, catalog, layers
    wanted = [(p.__name__, name) for p in packages for name in functions(p)]
    for package, name in wanted:
        kind, module = found[package, name]
        assert kind in ("function", "type", "ABCMeta"), (package, name, kind)
        assert getattr(importlib.import_module(module), name) is getattr(
            sys.modules[package], name
        )


def functions(package):
    """The public names of a package, or else those that are no modules."""
    return getattr(package, "__all__", None) or callables(package)


def callables(package):
    return [
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and callable(value)
    ]


@pytest.mark.parametrize("package", [sadsl, catalog, layers], ids=lambda p: p.__name__)
def test_no_module_bears_the_name_of_what_it_does_not_define(package):
    for name in functions(package):
        (folder,) = package.__path__
        stands = [pathlib.Path(folder) / f"{name}.py", pathlib.Path(folder) / name]
        if any(path.exists() for path in stands):
            module = importlib.import_module(f"{package.__name__}.{name}")
            assert getattr(module, name) is getattr(package, name)


def test_dir_shows_public_names_only():
    assert dir(sadsl) == sorted([*sadsl.__all__, "__version__"])
    assert sorted(set(sadsl.__all__)) == sadsl.__all__
    assert sorted(callables(sadsl)) == sadsl.__all__


# --- names in texts ---

PATH = re.compile(r"\b(?:sadsl|sa)((?:\.[A-Za-z_]\w*)+)(\*?)")


def texts():
    """Every string of the package and where it stands; an f-string in its parts."""
    for folder in FLOORS:
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{path.relative_to(ROOT.parent)}:{node.lineno}", node.value


def resolves(names, prefix):
    """Whether a user who imports packages by name reaches ``sadsl.<names>``."""
    value = sadsl
    for at, name in enumerate(names):
        if prefix and at == len(names) - 1:
            return any(found.startswith(name) for found in vars(value))
        if not hasattr(value, name):
            # Public packages are imported by name; other modules are no attributes.
            try:
                importlib.import_module(".".join(["sadsl", *names[: at + 1]]))
            except ModuleNotFoundError:
                return False
        value = getattr(value, name, None)
        if value is None:
            return False
    return True


def test_paths_in_texts_resolve():
    """Errors and docstrings send nobody to ``sadsl.x.y`` where that is not."""
    seen = 0
    for place, text in texts():
        for match in PATH.finditer(text):
            seen += 1
            names = match[1][1:].split(".")
            assert resolves(names, bool(match[2])), f"{place}: {match[0]}"
    assert seen > 20
