"""Targets: chips by name, and compilation for chips that this machine lacks."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    SingleDeviceSharding,
    use_abstract_mesh,
)


@dataclass(frozen=True)
class Target:
    """A kind of chip, with the names that jax uses for it."""

    name: str
    platform: Literal["tpu", "cuda"]
    device_kind: str
    # For a TPU the tensor cores of a device, for a GPU its streaming multiprocessors.
    num_cores: int
    # The smallest topology with such a chip, in the spelling of libtpu.
    topology: str | None = None


TARGETS = {
    target.name: target
    for target in (
        Target("tpu-v5e", "tpu", "TPU v5 lite", 1, "v5e:2x2"),
        Target("tpu-v5p", "tpu", "TPU v5", 2, "v5p:2x2x1"),
        Target("tpu-v6e", "tpu", "TPU v6 lite", 1, "v6e:2x2"),
        Target("tpu7x", "tpu", "TPU7x", 1, "tpu7x:2x2x1"),
        Target("a100", "cuda", "NVIDIA A100-SXM4-80GB", 108),
        Target("h100", "cuda", "NVIDIA H100 80GB HBM3", 132),
        Target("h200", "cuda", "NVIDIA H200", 132),
        Target("b200", "cuda", "NVIDIA B200", 148),
    )
}


def find(name: str) -> Target:
    """The target of that name.

    Raises:
      ValueError: no target has that name.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r}: must be one of {', '.join(TARGETS)}")
    return TARGETS[name]


def abstract_mesh(target: str) -> use_abstract_mesh:
    """A context in which kernels are traced and lowered as if on ``target``."""
    chip = find(target)
    device = AbstractDevice(chip.device_kind, chip.num_cores, chip.platform)
    # The default axis type, Explicit, breaks vmapped kernels in jax 0.12.
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return use_abstract_mesh(mesh)


@contextmanager
def _shared_libtpu() -> Generator[None, None, None]:
    # libtpu lets only one process of a machine load it, since a chip has one owner.
    # Here nothing runs on a chip, so that several compilers may run side by side.
    name = "ALLOW_MULTIPLE_LIBTPU_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def tpu_device(target: str) -> Any:
    """A device of ``target`` to compile for; this needs libtpu, but no TPU."""
    chip = find(target)
    if chip.topology is None:
        raise ValueError(f"target={target!r} is not a TPU")
    try:
        with _shared_libtpu():
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=chip.topology
            )
    except Exception as error:
        raise RuntimeError(
            f"libtpu could not describe {chip.topology!r}, so nothing compiles for "
            f"{target!r}; `pip install libtpu` if it is missing ({error})"
        ) from error
    return topology.devices[0]


def lower_for(fn: Callable[..., Any], args: tuple, target: str) -> jax.stages.Lowered:
    """``jax.jit(fn)`` lowered for ``target``; args are arrays or ShapeDtypeStructs."""
    chip = find(target)
    with abstract_mesh(target):
        traced = jax.jit(fn).trace(*args)
        return traced.lower(lowering_platforms=(chip.platform,))


def compile_for(
    fn: Callable[..., Any], args: tuple, target: str
) -> jax.stages.Compiled:
    """``jax.jit(fn)`` compiled to the machine code of ``target``, a TPU."""
    if find(target).platform != "tpu":
        raise NotImplementedError(
            f"target={target!r}: compiling for a GPU needs that GPU; lower_for does not"
        )
    place = SingleDeviceSharding(tpu_device(target))

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    lowered = lower_for(fn, jax.tree.map(placed, args), target)
    return lowered.compile()
