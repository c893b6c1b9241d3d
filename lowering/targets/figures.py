"""Reports of compiled programs: what the readers of each platform found, by name."""

from collections.abc import Mapping
from typing import Any

from lowering.targets import cpu, gpu, tpu, triton_ir
from lowering.targets.chips import Target
from lowering.targets.report import KernelFigures, LoopFigures

# The loops of our attention kernels, in order of their code. The third one repeats a
# walk whose sums were not finite; it seldom runs.
TILE_LOOPS = "full tile", "partial tile", "repeat"
# The functions of our GPU kernels that walk over tiles.
TILE_KERNELS = "forward_kernel", "dq_kernel", "dkv_kernel"


def tile_flops(name: str, flops: Mapping[str, float]) -> float | None:
    """FLOPs of the products of one tile in the kernel of this name, if it is known.

    ``flops`` are by the kernel's name without "sadsl_" and the number of the call.
    """
    return flops.get(name.removeprefix("sadsl_").partition(".")[0])


def loop_names(count: int, tiled: bool) -> list[str]:
    """Names of the loops of a kernel; those of kernels over tiles say which tiles."""
    known = TILE_LOOPS if tiled and count > 1 else ()
    return [*known, *(f"loop {i + 1}" for i in range(len(known), count))][:count]


def of_tpu(
    kernels: tuple[tpu.TpuKernel, ...], chip: Target, flops: Mapping[str, float]
) -> tuple[KernelFigures, ...]:
    """Figures of TPU kernels.

    Bundles are of one step of a loop: of one tile, if the loop walks over tiles. The
    share of the peak is that of the tile's products in these bundles; a bundle takes at
    least one cycle.
    """
    return tuple(_of_tpu(kernel, chip, flops) for kernel in kernels)


def _of_tpu(
    kernel: tpu.TpuKernel, chip: Target, flops: Mapping[str, float]
) -> KernelFigures:
    one = tile_flops(kernel.name, flops)
    # Bundles may take several lines, so the code is shown by bundles.
    lines = kernel.code.splitlines()
    starts = [at for at, line in enumerate(lines) if tpu.BUNDLE.match(line)]
    starts.append(len(lines))
    loops = []
    names = loop_names(len(kernel.loops), one is not None)
    for name, span in zip(names, kernel.loops, strict=True):
        figures: dict[str, Any] = {
            "bundles": span.bundles,
            "matrix ops": span.matrix_ops,
            "spills": span.spills,
        }
        if one is not None:
            peak = span.bundles * chip.flops_per_cycle
            figures["share of peak"] = one / peak
        shares = kernel.busy.shares(span)
        if shares:
            unit = max(shares, key=lambda unit: shares[unit])
            figures["busiest unit"] = f"{unit} {shares[unit]:.0%}"
        first, last = starts[span.first], starts[span.last + 1] - 1
        loops.append(LoopFigures(name, first, last, figures))
    figures = {
        "bundles": kernel.bundles,
        "matrix ops": kernel.matrix_ops,
        "spills": kernel.spills,
        "VMEM": kernel.vmem,
        "SMEM": kernel.smem,
    }
    return KernelFigures(kernel.name, figures, tuple(loops), kernel.code)


def of_gpu(kernels: tuple[gpu.GpuKernel, ...]) -> tuple[KernelFigures, ...]:
    """Figures of GPU kernels: of SASS if there is some, else of PTX."""
    return tuple(_of_gpu(kernel) for kernel in kernels)


def _of_gpu(kernel: gpu.GpuKernel) -> KernelFigures:
    names = loop_names(len(kernel.loops), kernel.name in TILE_KERNELS)
    loops = tuple(
        LoopFigures(
            name,
            loop.first,
            loop.last,
            {"instructions": loop.instructions, "matrix ops": loop.products},
        )
        for name, loop in zip(names, kernel.loops, strict=True)
    )
    figures = {
        "registers": kernel.registers,
        "spill stores": kernel.spill_stores,
        "spill loads": kernel.spill_loads,
        "shared memory": kernel.shared_memory,
        "wgmma": kernel.ptx.count("wgmma.mma_async"),
        "mma": kernel.ptx.count("mma.sync"),
        "tcgen05.mma": kernel.ptx.count("tcgen05.mma"),
        "SASS": kernel.products,
    }
    kept = {name: x for name, x in figures.items() if x != 0 or "spill" in name}
    return KernelFigures(kernel.name, kept, loops, kernel.sass or kernel.ptx)


def of_triton_ir(
    kernels: tuple[triton_ir.TritonKernel, ...],
) -> tuple[KernelFigures, ...]:
    """Figures of GPU kernels where nothing compiles them."""
    found = []
    for kernel in kernels:
        spans = triton_ir.loops(str(kernel))
        names = loop_names(len(spans), kernel.name in TILE_KERNELS)
        loops = tuple(
            LoopFigures(name, first, last, {"lines": last - first + 1, "matrix ops": n})
            for name, (first, last, n) in zip(names, spans, strict=True)
        )
        figures = {
            "grid": " x ".join(map(str, kernel.grid)),
            "warps": kernel.num_warps,
            "stages": kernel.num_stages,
        }
        found.append(KernelFigures(kernel.name, figures, loops, str(kernel)))
    return tuple(found)


def of_hlo(name: str, hlo: str) -> KernelFigures:
    """Figures of a program that XLA compiled, by its loops with products."""
    loops = tuple(
        LoopFigures(
            f"hot loop {i + 1}",
            loop.first,
            loop.last,
            {"fusions": len(loop.fusions), "matrix ops": loop.products},
        )
        for i, loop in enumerate(cpu.hot_loops(hlo))
    )
    return KernelFigures(name, {"lines": len(hlo.splitlines())}, loops, hlo)
