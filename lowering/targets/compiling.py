"""Traces, lowers and compiles functions for chips that this machine lacks."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from lowering.targets.chips import find


def abstract_mesh(target: str) -> use_abstract_mesh:
    """A context in which kernels are traced and lowered as if on ``target``."""
    chip = find(target)
    device = AbstractDevice(chip.device_kind, chip.num_cores, chip.platform)
    # The default axis type, Explicit, breaks vmapped kernels in jax 0.12.
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return use_abstract_mesh(mesh)


def traced_for(target: str) -> AbstractContextManager[Any]:
    """``abstract_mesh``, or nothing if ``target`` is "cpu"."""
    return nullcontext() if target == "cpu" else abstract_mesh(target)


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
    return tpu_devices(chip.topology)[0]


def tpu_devices(topology: str) -> Sequence[Any]:
    """The devices of a topology such as "v5e:16x16"; this needs libtpu, but no TPU.

    Raises:
      RuntimeError: libtpu is missing, or knows no such topology.
    """
    try:
        with _shared_libtpu():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        raise RuntimeError(
            f"libtpu could not describe {topology!r}, so nothing compiles for it: name "
            "another topology, or `pip install libtpu` if it is missing "
            f"({error})"
        ) from error
    return found.devices


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
            f"target={target!r}: in this process only TPUs are compiled for: "
            "lower_for needs no compiler, and lowering.targets.outside has another"
        )
    place = SingleDeviceSharding(tpu_device(target))

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    lowered = lower_for(fn, jax.tree.map(placed, args), target)
    return lowered.compile()
