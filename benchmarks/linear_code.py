"""Code of the linear kernels: bundles on TPUs, registers and spills on GPUs.

    python benchmarks/linear_code.py > results/linear_code.txt

One chunk of one head, in bf16, of each kind: "none" and "head" are ``linear`` with a
normaliser, without and with a decay by head; "channel" has a decay by key channel and
no normaliser; "delta" erases; the last two do both. A bundle is one very long
instruction word, so it takes at least one cycle. No TPU is needed, and nothing is
timed. Registers need NVIDIA's ``ptxas``: where it cannot be had, the shapes of the
Triton kernels are printed alone.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

DUMP = tempfile.mkdtemp(prefix="linear_bundles_")
# Read once, when libtpu is loaded.
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true "
    + os.environ.get("LIBTPU_INIT_ARGS", "")
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from timing import machine, table  # noqa: E402

from lowering.targets import compiling  # noqa: E402
from pallas_kernels import linear  # noqa: E402

HEADS, LENGTH = 4, 2048
KINDS = "none", "head", "channel", "delta", "delta, head", "delta, channel"
CHIPS = "tpu-v5e", "tpu-v6e", "tpu7x"
KERNELS = "forward", "states", "backward"


def program(kind: str, dim: int, chunk: int) -> tuple[Callable, tuple]:
    """Value and gradient of one call in bf16, and the shapes that it takes."""
    shape, dtype = (1, HEADS, LENGTH, dim), jnp.bfloat16
    k = jax.ShapeDtypeStruct(shape, dtype)
    decay = None
    if "channel" in kind or "head" in kind:
        size = shape if "channel" in kind else shape[:3]
        decay = jax.ShapeDtypeStruct(size, jnp.float32)
    inputs = linear.LinearInputs(
        q=jax.ShapeDtypeStruct((1, HEADS, 1, LENGTH, dim), dtype), k=k, v=k,
        erase=k if "delta" in kind else None, log_decay=decay,
    )  # fmt: skip
    eps = 1e-10 if kind in ("none", "head") else None
    call = linear.LinearCall(linear.Recurrence(eps), chunk)

    def loss(inputs: linear.LinearInputs) -> jax.Array:
        out = linear.attend(inputs, call, impl="tpu").out
        return jnp.sum(out.astype(jnp.float32))

    return jax.value_and_grad(loss), (inputs,)


def bundles(name: str) -> tuple[int, int, int]:
    """Bundles, matrix instructions and spills of the kernel compiled last."""
    pattern = f"*sadsl_linear_{name}*final_bundles.txt"
    files = [x for x in Path(DUMP).glob(pattern) if "schedule-analysis" not in x.name]
    text = max(files, key=lambda x: x.stat().st_mtime_ns).read_text()
    count = len(re.findall(r"^\s*0x[0-9a-f]+", text, re.MULTILINE))
    return count, len(re.findall(r"= vmatmul", text)), text.count("spill")


def code(chips: list[str], dims: list[int], chunks: list[int]) -> str:
    """Bundles of the kernels, per chunk of one head, and what they hold."""
    rows = []
    for chip in chips:
        for dim in dims:
            for kind in KINDS:
                for chunk in chunks:
                    compiling.compile_for(*program(kind, dim, chunk), chip)
                    found = [bundles(name) for name in KERNELS]
                    cells = [" / ".join(map(str, x)) for x in found]
                    forward, *backward = (x[0] / chunk for x in found)
                    both = f"{forward:.1f}", f"{sum(backward):.1f}"
                    rows.append([chip, str(dim), kind, str(chunk), *cells, *both])
    head = ["chip", "head_dim", "kind", "chunk", *KERNELS, "a token", "backward"]
    note = (
        "TPU kernels in bf16: bundles / matrix multiplications / spills of a kernel, "
        "and bundles a token of one head"
    )
    return f"{note}\n\n{table(head, rows)}"


def main() -> None:
    """Compiles, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS))
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--chunks", nargs="+", type=int, default=[128, 256])
    args = parser.parse_args()
    print(machine("jax", "libtpu", "sadsl"))
    print()
    print(code(args.chips, args.dims, args.chunks))


if __name__ == "__main__":
    main()
