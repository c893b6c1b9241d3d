"""Settings of all tests, made before jax is imported anywhere."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compiles interpreted kernels without most optimizations.

    They take far longer to compile than to run once. The XLA path is compiled as for
    users.
    """
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    interpreted = params.get("impl") in ("reference", "tpu", "triton")
    jax.config.update("jax_disable_most_optimizations", interpreted)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick(quick_compilation):
    """Compiles the XLA path without most optimizations too, as no time is measured."""
    jax.config.update("jax_disable_most_optimizations", True)
