"""This machine in words, for figures that mean nothing without it."""

import os
import platform
from pathlib import Path

import jax


def cpu() -> str:
    """The name of the CPU, and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """The bytes of memory that are free for use, or None if the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = [int(x.split()[1]) for x in lines if x.startswith("MemAvailable")]
    return 1024 * free[0] if free else None


def devices() -> list[str]:
    """The devices of jax, such as "cpu: cpu" or "gpu: NVIDIA H200 x 8".

    Raises:
      RuntimeError: jax cannot start the platform that it was told to use.
    """
    found: dict[str, int] = {}
    for device in jax.devices():
        name = f"{device.platform}: {device.device_kind}"
        found[name] = found.get(name, 0) + 1
    return [name if n == 1 else f"{name} x {n}" for name, n in found.items()]
