"""Settings of all tests, made before jax is imported anywhere."""

import os
from pathlib import Path
from zlib import crc32

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import hypothesis
import jax
import pytest
from laws import WHOLE

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci")

# Scripts with environments of their own: `make test-clients`.
collect_ignore = ["clients"]

SLOW = frozenset(Path(__file__).with_name("slow_cases.txt").read_text().splitlines())
# Examples in docstrings, which have no fixture, compile quickly as well.
jax.config.update("jax_disable_most_optimizations", not WHOLE)


def pytest_collection_modifyitems(items):
    """Chooses what of large tables runs in ``make test``; the rest becomes ``slow``.

    Of a case that is there for several backends (``impl``), one backend stays. The
    backends take turns, from case to case and from test to test. Of a test with the
    marker ``sample(n)``, ``n`` cases stay, evenly spread. ``slow_cases.txt`` names
    those of the rest that cost too much.
    """
    tests = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            params = dict(getattr(getattr(item, "callspec", None), "params", {}))
            impl = params.pop("impl", None)
            case = tuple(sorted((name, str(value)) for name, value in params.items()))
            of_test = tests.setdefault(item.nodeid.split("[")[0], {})
            of_test.setdefault(case if impl else item.nodeid, []).append(item)
    for name, cases in tests.items():
        kept = list(cases.values())
        marker = kept[0][0].get_closest_marker("sample")
        if marker:
            step = -(-len(kept) // marker.args[0])
            kept = kept[crc32(name.encode()) % step :: step]
        stay = set()
        # The same case stays, whatever else is collected.
        for turn, backends in enumerate(kept, start=crc32(name.encode())):
            stay.add(backends[turn % len(backends)])
        for item in (each for backends in cases.values() for each in backends):
            if item not in stay:
                item.add_marker(pytest.mark.slow)
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if WHOLE:
        for item in items:
            if item.get_closest_marker("hypothesis"):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compiles interpreted kernels without most optimizations.

    In ``make test-slow`` the XLA path is compiled as users have it.
    """
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    interpreted = params.get("impl") in ("reference", "tpu", "triton")
    optimised = WHOLE or request.node.get_closest_marker("optimised")
    jax.config.update("jax_disable_most_optimizations", interpreted or not optimised)
    yield
    jax.config.update("jax_disable_most_optimizations", not WHOLE)


@pytest.fixture
def quick(quick_compilation):
    """Compiles the XLA path without most optimizations too, as no time is measured."""
    jax.config.update("jax_disable_most_optimizations", True)
