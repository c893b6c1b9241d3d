"""Chips are found by name; the tests of the TPU kernels compile for them."""

import os

import jax
import jax.numpy as jnp
import pytest

from lowering.targets import chips, compiling

ARGS = (jax.ShapeDtypeStruct((8, 128), jnp.float32),)
TPUS = [name for name, chip in chips.TARGETS.items() if chip.platform == "tpu"]
GPUS = [name for name in chips.TARGETS if name not in TPUS]


@pytest.mark.parametrize("name", chips.TARGETS)
def test_lowers_for_every_target(name):
    assert "stablehlo" in compiling.lower_for(jnp.sin, ARGS, name).as_text()


@pytest.mark.parametrize("name", TPUS)
def test_compiles_for_every_tpu(name):
    device = compiling.tpu_device(name)
    assert device.device_kind == chips.TARGETS[name].device_kind
    compiled = compiling.compile_for(jnp.sin, ARGS, name)
    assert compiled.memory_analysis().argument_size_in_bytes == 8 * 128 * 4


def test_libtpu_stays_exclusive_for_those_who_run(monkeypatch):
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    compiling.tpu_device("tpu-v5e")
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" not in os.environ


def test_an_unknown_name():
    with pytest.raises(ValueError, match="'tpu-v1': must be one of tpu-v4"):
        chips.find("tpu-v1")


def test_compiling_for_a_gpu():
    with pytest.raises(NotImplementedError, match="only TPUs are compiled for"):
        compiling.compile_for(jnp.sin, ARGS, "h100")
    with pytest.raises(ValueError, match="not a TPU"):
        compiling.tpu_device("h100")


def test_a_topology_that_libtpu_refuses(monkeypatch):
    peak = chips.TARGETS["tpu-v4"].peak
    chip = chips.Target("odd", "tpu", "TPU", 1, peak, "no-such:2x2")
    monkeypatch.setitem(chips.TARGETS, "odd", chip)
    with pytest.raises(RuntimeError, match="pip install libtpu"):
        compiling.tpu_device("odd")


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_as_its_compiler_is_told(name):
    text = chips.gpu_config(chips.find(name))
    assert text.count("{") == text.count("}")
    assert f'"{chips.find(name).device_kind}"' in text
    assert f"core_count: {chips.find(name).num_cores}\n" in text


def test_what_is_no_gpu_has_no_such_figures():
    with pytest.raises(ValueError, match="target='tpu-v4' is not a GPU"):
        chips.gpu_config(chips.find("tpu-v4"))


def test_units_and_clocks_reach_the_public_peaks():
    """At the clocks of ``chips``, within one percent; tpu7x has no public clock."""
    clocks = {"tpu-v4": 1.05e9, "tpu-v5e": 1.5e9, "tpu-v5p": 1.75e9, "tpu-v6e": 1.75e9}
    for name, clock in clocks.items():
        chip = chips.find(name)
        rate = chip.flops_per_cycle * chip.num_cores * clock
        assert rate == pytest.approx(chip.peak.half, rel=0.01)
