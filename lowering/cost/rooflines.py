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
from lowering.targets.chips import TARGETS, Peak

# Public figures of one chip; ``lowering.targets.chips`` has their sources.
PEAKS: Mapping[str, Peak] = {name: chip.peak for name, chip in TARGETS.items()}


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
