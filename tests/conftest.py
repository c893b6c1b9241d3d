"""Settings of all tests, made before jax is imported anywhere."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import hypothesis
import jax
import pytest
from laws import WHOLE

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    """Of a table of cases by backends, all but one backend a case are ``slow``.

    The backends take turns, from case to case and from test to test, so that each meets
    most of what there is in ``make test``, and all of it in ``make test-slow``.
    """
    cases = {}
    for item in items:
        params = dict(getattr(getattr(item, "callspec", None), "params", {}))
        if "impl" not in params or item.get_closest_marker("slow"):
            continue
        others = sorted((k, str(v)) for k, v in params.items() if k != "impl")
        cases.setdefault((item.nodeid.split("[")[0], *others), []).append(item)
    for turn, backends in enumerate(cases.values()):
        for place, item in enumerate(backends):
            if place != turn % len(backends):
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
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick(quick_compilation):
    """Compiles the XLA path without most optimizations too, as no time is measured."""
    jax.config.update("jax_disable_most_optimizations", True)
