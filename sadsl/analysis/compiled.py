"""``Compiled``: the code that a chip's compiler has made of a call, and its figures."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax

from lowering.targets import chips, compiling, figures, gpu, tpu, triton_ir
from lowering.targets.clients import CompiledProgram
from lowering.targets.outside import CompilerOutput
from lowering.targets.report import KernelFigures, Report


@dataclass(frozen=True)
class Compiled:
    """A compiled call.

    Attributes:
      lowered: the call.
      made: what the compiler wrote; None for a GPU whose tools are not installed.
    """

    lowered: Any
    made: CompilerOutput | CompiledProgram | None = field(repr=False)

    def asm(self, *, hot: bool = False) -> str:
        """The code of the kernels, with a margin that names the loop of each line.

        TPU bundles, SASS or PTX, or the optimised HLO of a CPU; for a GPU without its
        tools Triton IR. Behind the kernels of a TPU or GPU stands the HLO around them.

        Args:
          hot: show the loops with products only.
        """
        parts = [kernel.marked(hot=hot) for kernel in self._kernels]
        if self.lowered.target != "cpu" and not hot:
            if self.made is not None:
                parts.append(f"-- HLO around the kernels\n{self.made.hlo}")
            elif not parts:
                parts.append(self.lowered.module)
        return "\n\n".join(parts)

    def memory(self) -> dict[str, int]:
        """Bytes of arguments, outputs, temporaries and code; empty if not compiled."""
        return {} if self.made is None else dict(self.made.memory)

    def report(self) -> Report:
        """The figures of the compiler: print it, show it in a notebook, or as dict.

        TPU: bundles of each kernel, and of each of its loops over tiles; operations of
        the matrix unit; spills; bytes of VMEM and SMEM; the share of the matrix unit's
        peak that one tile reaches, if each bundle takes one cycle (above 100 % the
        products alone take longer). GPU: registers,
        spills, shared memory, instructions of tensor cores, and SASS by loop. CPU:
        fusions and products of the hot loops. ``notes`` say what is missing and why.
        """
        facts = {f"{name} (bytes)": n for name, n in self.memory().items()}
        return Report(self.lowered.target, facts, self._kernels, self._notes)

    @cached_property
    def executable(self) -> Any:
        """The program compiled in this process.

        One for a CPU runs; one for a TPU shows what jax says about it.

        Raises:
          NotImplementedError: the target is a GPU.
          RuntimeError: a TPU is the target and libtpu is not installed.
        """
        low = self.lowered
        if low.target == "cpu":
            return jax.jit(low.run).lower(*low.arguments).compile()
        return compiling.compile_for(low.run, low.arguments, low.target)

    @cached_property
    def _kernels(self) -> tuple[KernelFigures, ...]:
        low = self.lowered
        if low.target == "cpu":
            assert self.made is not None
            return (figures.of_hlo("program", self.made.hlo),)
        chip = chips.find(low.target)
        if not isinstance(self.made, CompilerOutput):
            return figures.of_triton_ir(triton_ir.triton_kernels(low.jax_lowered()))
        files = self.made.files
        if chip.platform == "tpu":
            return figures.of_tpu(tpu.kernels_of(files), chip, _tile_flops(low.parts))
        return figures.of_gpu(gpu.kernels_of(files))

    @property
    def _notes(self) -> tuple[str, ...]:
        low, found = self.lowered, []
        if low.target == "cpu":
            return ()
        if chips.find(low.target).platform == "cuda":
            missing = gpu.missing_tools()
            if self.made is None:
                missing = f"this is Triton IR: {missing}"
            found += [missing] if missing else []
        if not self._kernels:
            found.append("no kernel of this call multiplies matrices: XLA compiles all")
        return tuple(found)


def _tile_flops(parts: tuple) -> dict[str, float]:
    """FLOPs of a tile by kernel, where all parts agree."""
    of_parts = [part.tile_flops for part in parts]
    first = of_parts[0] if of_parts else {}
    return {
        name: value
        for name, value in first.items()
        if all(each[name] == value for each in of_parts)
    }
