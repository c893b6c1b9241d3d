"""Compiles a lowered program with a compiler for a chip that is not there.

jax offers this for functions; here the program is text or bytes, so that one process
lowers it and another one compiles it. What jax does not promise to keep stands here,
and works with jax 0.10 to 0.12.
"""

import io
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program: its optimised HLO, and bytes of memory by what needs them."""

    hlo: str
    memory: dict[str, int]


def program_bytes(lowered: jax.stages.Lowered) -> bytes:
    """A lowered program as MLIR bytecode, with the locations of its operations."""
    module: Any = lowered.compiler_ir("stablehlo")
    found = io.BytesIO()
    module.operation.write_bytecode(found)
    return found.getvalue()


def compile_bytes(program: bytes, device: Any) -> CompiledProgram:
    """Compiles the bytes of a program of one device; ``device`` is of a topology."""
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    devices = np.array([[device.id]])
    options.device_assignment = xla_client.DeviceAssignment.create(devices)
    with mlir.make_ir_context():
        made = device.client.compile(
            ir.Module.parse(program),
            executable_devices=xla_client.DeviceList((device,)),
            compile_options=options,
        )
    return CompiledProgram(_hlo(made), memory_of(made.get_compiled_memory_stats()))


def _hlo(made: Any) -> str:
    """The optimised program, or why it cannot be shown.

    libtpu runs some gathers and scatters on the SparseCore, and jaxlib cannot read the
    instructions that it makes of them.
    """
    try:
        return "\n".join(module.to_string() for module in made.hlo_modules())
    except jax.errors.JaxRuntimeError as error:
        return f"// The optimised program cannot be shown: {error}"


def memory_of(stats: Any) -> dict[str, int]:
    """Bytes of arguments, outputs, temporaries and code of a compiled program."""
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
