"""Chips by name: what jax calls them, and their public peak figures.

Peaks are of dense products without sparsity. Where they come from:

TPUs: Google Cloud documentation, https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e
and /tpu7x: peak bf16 compute and HBM bandwidth per chip. To jax, a TPU7x chip is two
devices. ``flops_per_cycle`` is that peak divided by the clock and the devices of a
chip. It equals what the matrix units of a device can do: eight 128 x 128 units for v4
and v5p, four for v5e, and twice two 256 x 256 for v6e. Clocks: Jouppi et al., TPU v4,
ISCA 2023, table 4 (1050 MHz). The others (1.5 GHz for v5e, 1.75 GHz for v5p and v6e)
are those for which peak and units agree; no data sheet has them. For tpu7x neither the
clock nor the units are public: its figure is that of v6e, not verified.

GPUs: NVIDIA data sheets, A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2023) and HGX
B200 (2024, an eighth of the board): peaks and memory. NVIDIA, A100, H100 and Blackwell
architecture white papers: multiprocessors, clocks, caches. CUDA C++ programming guide,
technical specifications by compute capability: threads, registers, shared memory. Not
verified: the clock of B200 (1.965 GHz) and its L2 cache (126 MB).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Peak:
    """The peak rates of one chip."""

    half: float  # FLOP/s of dense products of 16-bit operands
    single: float  # FLOP/s of products in float32 precision
    bandwidth: float  # byte/s of its main memory
    # Whether a cache in front of that memory holds what the rows of a head share.
    cache: bool


@dataclass(frozen=True)
class GpuFigures:
    """What a compiler asks about an NVIDIA GPU that is not there."""

    compute_capability: tuple[int, int]
    memory: int  # bytes
    l2_cache: int  # bytes
    clock_ghz: float
    float32_units: int  # per multiprocessor
    shared_memory: int  # KiB per multiprocessor

    @property
    def architecture(self) -> str:
        """What ``ptxas -arch`` takes; Hopper and later have features of their own."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@dataclass(frozen=True)
class Target:
    """A kind of chip, with the names that jax uses for it."""

    name: str
    platform: Literal["tpu", "cuda"]
    device_kind: str
    # For a TPU the tensor cores of a device, for a GPU its streaming multiprocessors.
    num_cores: int
    peak: Peak
    # The smallest topology with such a chip, in the spelling of libtpu.
    topology: str | None = None
    # FLOPs of the matrix units of one tensor core in one cycle, bf16; 0 for GPUs.
    flops_per_cycle: int = 0
    gpu: GpuFigures | None = None


def _tpu(tera_flops: float, giga_bytes: float) -> Peak:
    # Full float32 is six bf16 passes of the matrix unit. There is no cache: on-chip
    # memory holds what the kernel itself puts there.
    half = tera_flops * 1e12
    return Peak(half, half / 6, giga_bytes * 1e9, cache=False)


def _gpu(tera_flops: float, tera_flops_f32: float, giga_bytes: float) -> Peak:
    # The kernels multiply f32 outside of the tensor cores, which would round to TF32.
    return Peak(tera_flops * 1e12, tera_flops_f32 * 1e12, giga_bytes * 1e9, cache=True)


# FLOPs in a cycle of the matrix units of one tensor core.
_SMALL_UNITS = 4 * 2 * 128 * 128
_LARGE_UNITS = 4 * 2 * 256 * 256
_HOPPER = {"l2_cache": 50 << 20, "clock_ghz": 1.98, "float32_units": 128}

TARGETS = {
    target.name: target
    for target in (
        Target(
            "tpu-v4", "tpu", "TPU v4", 2, _tpu(275, 1228), "v4:2x2x1", _SMALL_UNITS
        ),
        Target(
            "tpu-v5e", "tpu", "TPU v5 lite", 1, _tpu(197, 819), "v5e:2x2", _SMALL_UNITS
        ),
        Target(
            "tpu-v5p", "tpu", "TPU v5", 2, _tpu(459, 2765), "v5p:2x2x1", _SMALL_UNITS
        ),
        Target(
            "tpu-v6e", "tpu", "TPU v6 lite", 1, _tpu(918, 1640), "v6e:2x2", _LARGE_UNITS
        ),
        Target(
            "tpu7x", "tpu", "TPU7x", 1, _tpu(2307, 7370), "tpu7x:2x2x1", _LARGE_UNITS
        ),
        Target(
            "a100", "cuda", "NVIDIA A100-SXM4-80GB", 108, _gpu(312, 19.5, 2039),
            gpu=GpuFigures((8, 0), 80 << 30, 40 << 20, 1.41, 64, 164),
        ),
        Target(
            "h100", "cuda", "NVIDIA H100 80GB HBM3", 132, _gpu(989, 67, 3350),
            gpu=GpuFigures((9, 0), 84942979072, shared_memory=228, **_HOPPER),
        ),
        Target(
            "h200", "cuda", "NVIDIA H200", 132, _gpu(989, 67, 4800),
            gpu=GpuFigures((9, 0), 151397597184, shared_memory=228, **_HOPPER),
        ),
        Target(
            "b200", "cuda", "NVIDIA B200", 148, _gpu(2250, 75, 8000),
            gpu=GpuFigures((10, 0), 180 << 30, 126 << 20, 1.965, 128, 228),
        ),
    )
}  # fmt: skip

# What a caller may name: the chips, and the CPU of this machine.
NAMES = ("cpu", *TARGETS)


def find(name: str) -> Target:
    """The chip of that name.

    Raises:
      ValueError: no chip has that name.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r}: must be one of {', '.join(TARGETS)}")
    return TARGETS[name]


def gpu_config(chip: Target) -> str:
    """A GPU as a ``GpuTargetConfigProto`` of XLA in text form.

    >>> print(gpu_config(find("h200")).splitlines()[-1])
    platform_name: "CUDA" device_description_str: "NVIDIA H200"
    """
    figures = chip.gpu
    if figures is None:
        raise ValueError(f"target={chip.name!r} is not a GPU")
    major, minor = figures.compute_capability
    shared = figures.shared_memory << 10
    values = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": shared,
        # A block leaves 1 KiB to the system.
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": 2048,
        "core_count": chip.num_cores,
        "fpus_per_core": figures.float32_units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.peak.bandwidth),
        "l2_cache_size": figures.l2_cache,
        "clock_rate_ghz": figures.clock_ghz,
        "device_memory_size": figures.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in values.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{lines}\n{capability}\n}}\n"
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'platform_name: "CUDA" device_description_str: "{chip.device_kind}"'
    )
