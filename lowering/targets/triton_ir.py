"""Extracts the Triton IR of the GPU kernels in a lowered program, as text."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxlib.mlir import ir
from jaxlib.mlir.passmanager import PassManager
from jaxlib.triton import dialect as triton_dialect

TRITON_CALL = "__gpu$xla.gpu.triton"


@dataclass(frozen=True)
class TritonKernel:
    """One kernel launch of a lowered program; ``code`` is Triton IR."""

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    code: str

    def __str__(self) -> str:
        options = f"{self.num_warps} warps, {self.num_stages} stages"
        return f"// {self.name}: grid {self.grid}, {options}\n{self.code}"


def triton_kernels(lowered: jax.stages.Lowered) -> tuple[TritonKernel, ...]:
    """The Triton kernels of a program lowered for CUDA, in the order of their calls."""
    calls = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call":
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
            calls.extend([operation] if target == TRITON_CALL else [])
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    module.operation.walk(visit)
    return tuple(_kernel(call) for call in calls)


def triton_ir(lowered: jax.stages.Lowered) -> str:
    """The text of ``triton_kernels``; empty if the program has none."""
    return "\n".join(str(kernel) for kernel in triton_kernels(lowered))


def loops(code: str) -> tuple[tuple[int, int, int], ...]:
    """The innermost loops with products: first and last line, number of products."""
    lines, found, open_ = code.splitlines(), [], []
    for at, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line or "scf.while" in line:
            open_.append((indent, at))
        elif open_ and indent == open_[-1][0] and line.rstrip() == " " * indent + "}":
            found.append((open_.pop()[1], at))
    counts = [sum("tt.dot" in x for x in lines[a : b + 1]) for a, b in found]
    whole = [(a, b, n) for (a, b), n in zip(found, counts, strict=True) if n]
    return tuple(
        sorted(x for x in whole if not any(x[0] < y[0] and y[1] < x[1] for y in whole))
    )


def _kernel(call: ir.Operation) -> TritonKernel:
    if "mhlo.backend_config" not in call.attributes:
        raise NotImplementedError(
            f"jax {jax.__version__} does not keep the Triton IR of a kernel in "
            "mhlo.backend_config: use jax 0.10, 0.11 or 0.12, which do"
        )
    options = ir.DictAttr(call.attributes["mhlo.backend_config"])

    def number(name: str) -> int:
        return ir.IntegerAttr(options[name]).value

    return TritonKernel(
        name=ir.StringAttr(options["name"]).value,
        grid=(number("grid_x"), number("grid_y"), number("grid_z")),
        num_warps=number("num_warps"),
        num_stages=number("num_stages"),
        code=_readable(ir.StringAttr(options["ir"]).value_bytes),
    )


def _readable(bytecode: bytes) -> str:
    context = ir.Context()
    triton_dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        module = ir.Module.parse(bytecode)
        # Half of the lines as lowered compute zero: an index times a stride of zero.
        PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        return str(module)
