"""Targets are found by name; the tests of the TPU kernels compile for them."""

import os

import jax
import jax.numpy as jnp
import pytest

from lowering.cost import targets

ARGS = (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_lowers_for_every_target(name):
    assert "stablehlo" in targets.lower_for(jnp.sin, ARGS, name).as_text()


@pytest.mark.parametrize(
    "name", [n for n, t in targets.TARGETS.items() if t.platform == "tpu"]
)
def test_compiles_for_every_tpu(name):
    device = targets.tpu_device(name)
    assert device.device_kind == targets.TARGETS[name].device_kind
    compiled = targets.compile_for(jnp.sin, ARGS, name)
    assert compiled.memory_analysis().argument_size_in_bytes == 8 * 128 * 4


def test_libtpu_stays_exclusive_for_those_who_run(monkeypatch):
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    targets.tpu_device("tpu-v5e")
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" not in os.environ


def test_an_unknown_name():
    with pytest.raises(ValueError, match="'tpu-v1': must be one of tpu-v5e"):
        targets.find("tpu-v1")


def test_compiling_for_a_gpu():
    with pytest.raises(NotImplementedError, match="lower_for does not"):
        targets.compile_for(jnp.sin, ARGS, "h100")
    with pytest.raises(ValueError, match="not a TPU"):
        targets.tpu_device("h100")


def test_a_topology_that_libtpu_refuses(monkeypatch):
    chip = targets.Target("odd", "tpu", "TPU", 1, "no-such:2x2")
    monkeypatch.setitem(targets.TARGETS, "odd", chip)
    with pytest.raises(RuntimeError, match="pip install libtpu"):
        targets.tpu_device("odd")
