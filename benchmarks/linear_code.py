"""Code of the linear kernels on TPUs: bundles and spills of each length of a step.

    python benchmarks/linear_code.py > results/linear_code.txt

One grid step of one head, in bf16, of each kind: "none" and "head" are ``linear`` with
a normaliser, without and with a decay by head; "channel" has a decay by key channel and
no normaliser; "delta" erases; the last two do both. A bundle is one very long
instruction word, so it takes at least one cycle. A spill is a bundle that writes a
spilled register or reads it back. The bundles of a token are those of one grid step
over its tokens. A step has one or more chunks. The star marks the default step. No TPU
is needed, and nothing is timed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Read once, when libtpu is loaded.
DUMP = Path(tempfile.mkdtemp(prefix="linear_bundles_"))
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true "
    + os.environ.get("LIBTPU_INIT_ARGS", "")
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from timing import machine, table  # noqa: E402

from lowering.targets import compiling  # noqa: E402
from lowering.targets.tpu import read_kernels  # noqa: E402
from pallas_kernels import linear  # noqa: E402
from pallas_kernels.config import KernelConfig  # noqa: E402

HEADS, LENGTH = 4, 2048
KINDS = "none", "head", "channel", "delta", "delta, head", "delta, channel"
CHIPS = "tpu-v5e", "tpu-v6e"
KERNELS = "forward", "states", "backward"


class KernelCode(NamedTuple):
    """What libtpu makes of one kernel."""

    bundles: int
    matrix_ops: int
    spills: int


class StepCode(NamedTuple):
    """The kernels of one kind at one length of a step."""

    chip: str
    dim: int
    kind: str
    chunk: int
    default: bool
    kernels: tuple[KernelCode, ...]

    @property
    def forward(self) -> float:
        """Bundles of a token of one head in the forward pass."""
        return self.kernels[0].bundles / self.chunk

    @property
    def backward(self) -> float:
        """The same in the backward pass, which computes the states again."""
        return sum(x.bundles for x in self.kernels[1:]) / self.chunk


def inputs_of(kind: str, dim: int) -> linear.LinearInputs:
    """The shapes of the arrays of a call."""
    shape, dtype = (1, HEADS, LENGTH, dim), jnp.bfloat16
    k = jax.ShapeDtypeStruct(shape, dtype)
    decay = None
    if "channel" in kind or "head" in kind:
        size = shape if "channel" in kind else shape[:3]
        decay = jax.ShapeDtypeStruct(size, jnp.float32)
    return linear.LinearInputs(
        q=jax.ShapeDtypeStruct((1, HEADS, 1, LENGTH, dim), dtype), k=k, v=k,
        erase=k if "delta" in kind else None, log_decay=decay,
    )  # fmt: skip


def call_of(kind: str, dim: int, chunk: int | None) -> linear.LinearCall:
    """The call with that chunk, or with the default one."""
    rule = linear.Recurrence(1e-10 if kind in ("none", "head") else None)
    sizes = linear.LinearSizes(LENGTH, dim, dim, "delta" in kind, "channel" in kind)
    config = KernelConfig(block_kv=chunk)
    return linear.default_call(rule, "tpu", sizes, jnp.bfloat16, config)


def kernels(kind: str, dim: int, chunk: int, chip: str) -> tuple[KernelCode, ...]:
    """The code of the value and gradient of one call in bf16."""
    call = call_of(kind, dim, chunk)

    def loss(inputs: linear.LinearInputs) -> jax.Array:
        out = linear.attend(inputs, call, impl="tpu").out
        return jnp.sum(out.astype(jnp.float32))

    for path in DUMP.iterdir():
        path.unlink()
    compiling.compile_for(jax.value_and_grad(loss), (inputs_of(kind, dim),), chip)
    found = read_kernels(DUMP)
    named = [x for name in KERNELS for x in found if f"linear_{name}" in x.name]
    assert len(named) == len(KERNELS), [x.name for x in found]
    return tuple(KernelCode(x.bundles, x.matrix_ops, x.spills) for x in named)


def rows_of(
    chips: list[str], dims: list[int], kinds: list[str], chunks: list[int]
) -> Iterator[StepCode]:
    """Compiles every case, one at a time."""
    for chip in chips:
        for dim in dims:
            for kind in kinds:
                default = call_of(kind, dim, None).step
                for chunk in chunks:
                    print(chip, dim, kind, chunk, file=sys.stderr, flush=True)
                    found = kernels(kind, dim, chunk, chip)
                    yield StepCode(chip, dim, kind, chunk, chunk == default, found)


def code(rows: Iterator[StepCode]) -> str:
    """Bundles of the kernels, per grid step of one head and per token."""
    cells = [
        [
            row.chip, str(row.dim), row.kind,
            f"{row.chunk}{'*' if row.default else ''}",
            *(" / ".join(map(str, x)) for x in row.kernels),
            f"{row.forward:.2f}", f"{row.backward:.2f}",
            f"{row.forward + row.backward:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["chip", "head_dim", "kind", "step", *KERNELS, "a token", "backward", "sum"]
    note = (
        "TPU kernels in bf16: bundles / matrix operations / spills of a grid step, and "
        "bundles of a token of one head. * is the default step."
    )
    return f"{note}\n\n{table(head, cells)}"


def main() -> None:
    """Compiles, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS))
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--chunks", nargs="+", type=int, default=[128, 256, 512])
    args = parser.parse_args()
    print(machine("jax", "libtpu", "sadsl"))
    print()
    print(code(rows_of(args.chips, args.dims, args.kinds, args.chunks)))


if __name__ == "__main__":
    main()
