"""Predicts the time of a call on a chip by the roofline model, from public peaks.

The roofline model (Williams, Waterman and Patterson, Roofline: an insightful visual
performance model, 2009): a kernel takes as long as its matrix products take at peak
compute, or its memory traffic at peak bandwidth, whichever is longer. Real kernels
reach a part of the peaks, so compare such times with one another rather than with
measured times.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lowering.cost.cost import Cost


@dataclass(frozen=True)
class Peak:
    """The peak rates of one chip."""

    half: float  # FLOP/s of dense products of 16-bit operands
    single: float  # FLOP/s of products in float32 precision
    bandwidth: float  # byte/s of its main memory
    # Whether a cache in front of that memory holds what the rows of a head share.
    cache: bool


def _tpu(tera_flops: float, giga_bytes: float) -> Peak:
    # Full float32 is six bf16 passes of the matrix unit. There is no cache: on-chip
    # memory holds what the kernel itself puts there.
    half = tera_flops * 1e12
    return Peak(half, half / 6, giga_bytes * 1e9, cache=False)


def _gpu(tera_flops: float, tera_flops_f32: float, giga_bytes: float) -> Peak:
    # The kernels multiply f32 outside of the tensor cores, which would round to TF32.
    return Peak(tera_flops * 1e12, tera_flops_f32 * 1e12, giga_bytes * 1e9, cache=True)


# Public figures of one chip, without sparsity: bf16 TFLOP/s (GPUs: and FP32), GB/s.
PEAKS: Mapping[str, Peak] = {
    # Google Cloud documentation, "TPU v5e" (2023), "TPU v5p" (2023), "TPU v6e" (2024)
    # and "TPU7x (Ironwood)" (2025): peak compute and HBM bandwidth per chip. To jax, a
    # TPU7x chip is two devices.
    "tpu-v5e": _tpu(197, 819),
    "tpu-v5p": _tpu(459, 2765),
    "tpu-v6e": _tpu(918, 1640),
    "tpu7x": _tpu(2307, 7370),
    # NVIDIA data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2023),
    # HGX B200 (2024, an eighth of the board).
    "a100": _gpu(312, 19.5, 2039),
    "h100": _gpu(989, 67, 3350),
    "h200": _gpu(989, 67, 4800),
    "b200": _gpu(2250, 75, 8000),
}


@dataclass(frozen=True)
class Time:
    """A predicted time in seconds, and what limits it: "FLOPs" or "bytes"."""

    seconds: float
    limit: str


def predict(of: Cost, target: str, *, backward: bool = False) -> Time:
    """The time of a pass on a chip at its peak rates, one kernel after the other.

    Raises:
      ValueError: the target has no public peak.
    """
    if target not in PEAKS:
        raise ValueError(
            f"target={target!r} has no public peak to predict a time from: read the "
            f"counts, or name one of {', '.join(PEAKS)}"
        )
    peak = PEAKS[target]
    rate = peak.single if of.exact_products else peak.half
    works = of.works(backward)
    compute = [work.flops / rate for work in works]
    memory = [
        (work.least_bytes if peak.cache else work.bytes) / peak.bandwidth
        for work in works
    ]
    moving = of.permutation_bytes / peak.bandwidth
    kernels = sum(max(pair) for pair in zip(compute, memory, strict=True))
    limit = "FLOPs" if sum(compute) >= sum(memory) + moving else "bytes"
    return Time(kernels + moving, limit)
