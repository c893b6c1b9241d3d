"""Code of the TPU attention kernels: bundles that one tile executes.

    python benchmarks/tpu_static.py > results/tpu_static.txt
    python benchmarks/tpu_static.py --against ../other/checkout

A bundle is one very long instruction word, so it takes at least one cycle. A kernel has
one innermost loop over tiles without a test (full) and one over tiles with a test
(partial). The scheduled code of libtpu shows these loops. Every bundle of such a loop
is counted, also those that start the next copy. A third loop, which repeats a walk
because a sum was not finite, comes after these two and is not counted. No TPU is
needed, and nothing is timed.

A second table has the memory that libtpu gives each kernel at 131,072 tokens when it
reads a bit for every pair.

``--against`` compiles the same cases in another checkout of this repository. It prints
that checkout's counts before the arrow, and the change in percent of the sum of the
three kernels.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import table

import sadsl as sa
from lowering.targets import compiling as targets
from pallas_kernels import dispatch
from pallas_kernels.block_mask import blank
from pallas_kernels.call import WORD, Call, Inputs, Masks, PairBits, Vectors
from pallas_kernels.config import Tile, Tiles

N = 2048
LONG = 131072
BLOCK = 512
SPECS = {
    "causal": sa.causal(),
    "window": sa.window(512),
    "documents": sa.causal() & sa.segments(),
    "capped": sa.softmax(sa.causal(), logits_soft_cap=50.0),
    "ALiBi": sa.softmax(sa.causal(), bias=sa.alibi()),
    "top keys": sa.causal() & sa.topk(512, block=1, block_q=1),
    "top blocks": sa.causal() & sa.topk(4, block=128),
    "dense mask": sa.parse("where(lambda q, k: operand('mask')[q, k] == 1)"),
}
CHIPS = "tpu-v5e", "tpu-v6e"
HEAD_DIMS = 64, 128
KERNELS = "forward", "dq", "dkv"
KINDS = "full", "partial"
# A bundle: perhaps the mark of a loop's first one, a ">" for each loop, instructions.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0) +(LB|LH)?.*?: (>*) ?\{(.*)\}")

# What libtpu allocates, with its size and the place where it begins.
ALLOCATION = re.compile(r"space=(vmem|smem), size = (0x\w+|\d+), offset = (0x\w+|\d+)")

# Bundles of a full and of a partial tile, of each kernel: forward, dq, dkv.
Counts = list[int]


def loops(text: str) -> Counts:
    """Bundles of the innermost loops of a kernel that multiply matrices, in order."""
    found: list[list[str]] = []
    depth = deepest = 1
    for line in text.splitlines():
        match = BUNDLE.match(line)
        if not match:
            continue
        mark, nesting, instructions = match.groups()
        # A bundle that only waits shows no nesting.
        depth = len(nesting) if instructions.strip() else depth
        if depth > deepest:
            found, deepest = [], depth
        if depth == deepest:
            if mark:
                found.append([])
            found[-1].append(line)
    return [len(x) for x in found if any("= vmatmul" in line for line in x)]


def compiled(spec: str, chip: str, head_dim: int) -> None:
    """Compiles value and gradient of one call; libtpu writes its code to the dump."""
    x = jax.ShapeDtypeStruct((1, N, 1, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, N), jnp.int32)

    mask = jax.ShapeDtypeStruct((N, N), jnp.int32)

    def loss(arrays: Any, ids: Any, mask: Any) -> jax.Array:
        given = {"config": sa.KernelConfig(block_q=BLOCK, block_kv=BLOCK)}
        if spec == "documents":
            given |= {"q_segment_ids": ids, "kv_segment_ids": ids}
        if spec == "dense mask":
            given["operands"] = {"mask": mask}
        out = sa.attention(*arrays, SPECS[spec], impl="tpu", **given)
        return jnp.sum(out.astype(jnp.float32))

    targets.compile_for(jax.value_and_grad(loss), ((x, x, x), ids, mask), chip)


def code_of(kernel: str, files: list[Path], end: str) -> str:
    """What libtpu wrote about a kernel to the one file with this end of its name."""
    (code,) = (
        x for x in files
        if f"-sadsl_{kernel}." in x.name
        and x.name.endswith(end)
        and "schedule-analysis" not in x.name
    )  # fmt: skip
    return code.read_text()


def counts(dump: Path, cases: list[tuple[str, str, int]]) -> list[Counts]:
    """The bundles of each case, whose code libtpu writes to ``dump``."""
    found = []
    for case in cases:
        before = set(dump.iterdir())
        compiled(*case)
        new = [x for x in dump.iterdir() if x not in before]
        of_case: Counts = []
        for kernel in KERNELS:
            found_loops = loops(code_of(kernel, new, "final_bundles.txt"))
            if len(found_loops) < len(KINDS):
                raise RuntimeError(f"{case}, {kernel}: {len(found_loops)} loops")
            of_case += found_loops[: len(KINDS)]
        found.append(of_case)
    return found


def causal_and_bits(
    test: Any, q: Any, k: Any, q_vectors: tuple, kv_vectors: tuple, bits: tuple
) -> jax.Array:
    """The predicate of ``causal() & topk(...)``, on bits that are given."""
    del test, q_vectors, kv_vectors
    return (k - q <= 0) & bits[0]


def compiled_with_bits(n: int, chip: str) -> int:
    """Compiles the kernels of a run-time plan with a bit for every pair.

    Returns the bytes of HBM beside arguments and results.
    """
    tile = Tile(block_q=BLOCK, block_kv=BLOCK)
    call = Call(causal_and_bits, 1.0, Tiles(tile, tile, tile))
    blocks, one = n // BLOCK, np.zeros(1, np.int32)
    masks = [
        replace(blank(n, n, BLOCK, BLOCK, by), map_of_head=one, test_of_map=one)
        for by in ("q", "kv")
    ]

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    words = ints(1, 1, blocks, BLOCK // WORD, n)
    bits = PairBits(words, ints(n), BLOCK, keys_per_bit=1)
    x = jax.ShapeDtypeStruct((1, 1, n, 128), jnp.bfloat16)
    runs = {f"run_{name}": ints(blocks**2 // 2) for name in ("start", "stop", "full")}

    def loss(inputs: Inputs, bits: PairBits, runs: Any) -> jax.Array:
        rows, columns = (replace(m, max_runs=blocks, **runs) for m in masks)
        plans, vectors = Masks(rows, rows, columns), Vectors(bits=(bits,))
        out = dispatch.attend(inputs, vectors, plans, call, impl="tpu")
        return jnp.sum(out.o.astype(jnp.float32))

    args = Inputs(x, x, x), bits, runs | {"row_ptr": ints(blocks + 1)}
    program = targets.compile_for(jax.grad(loss), args, chip)
    return program.memory_analysis().temp_size_in_bytes


def memory(dump: Path, chips: list[str]) -> list[list[str]]:
    """A row of the second table for each chip."""
    found = []
    for chip in chips:
        before = set(dump.iterdir())
        row = [chip, f"{compiled_with_bits(LONG, chip) / 2**20:.0f} MiB"]
        new = [x for x in dump.iterdir() if x not in before]
        for kernel in KERNELS:
            code = code_of(kernel, new, "post-delay-converter.txt")
            used = {"vmem": 0, "smem": 0}
            for space, *numbers in ALLOCATION.findall(code):
                end = sum(int(x, 0) for x in numbers)
                used[space] = max(used[space], end)
            row += [f"{x / 1024:.0f} KiB" for x in used.values()]
        found.append(row)
    return found


def measured(
    root: Path, cases: list[tuple[str, str, int]], chips: list[str]
) -> tuple[list[Counts], list[list[str]]]:
    """``counts`` and ``memory`` in the checkout ``root``."""
    # libtpu reads its flags once in a process, when it is loaded.
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        env = os.environ | {
            "LIBTPU_INIT_ARGS": f"{flags} {os.environ.get('LIBTPU_INIT_ARGS', '')}",
            "PYTHONPATH": str(root),
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
        }
        command = [sys.executable, __file__, "--child", dump]
        asked = json.dumps([cases, chips])
        run = subprocess.run(
            command, input=asked, env=env, text=True, capture_output=True
        )
    if run.returncode:
        raise RuntimeError(run.stderr)
    found, rows = json.loads(run.stdout.splitlines()[-1])
    return found, rows


def cells(new: Counts, old: Counts | None) -> list[str]:
    """Bundles of full and partial tiles of each kernel, and of all three together."""

    def text(at: int) -> str:
        return f"{new[at]}" if old is None else f"{old[at]}->{new[at]}"

    found = []
    for i in range(0, len(new), len(KINDS)):
        found += [text(i), text(i + 1)]
    for kind in range(len(KINDS)):
        total = sum(new[kind :: len(KINDS)])
        if old is None:
            found.append(str(total))
        else:
            before = sum(old[kind :: len(KINDS)])
            found.append(f"{100 * (total / before - 1):+.1f} %")
    return found


def main() -> None:
    """Compiles, counts, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        cases, chips = json.load(sys.stdin)
        print(json.dumps([counts(args.child, cases), memory(args.child, chips)]))
        return
    cases = [
        (spec, chip, dim)
        for chip in args.chips
        for dim in args.head_dims
        for spec in args.specs
    ]
    here = Path(sa.__file__).parents[1]
    new, used = measured(here, cases, [] if args.against else args.chips)
    old: list[Counts] | list[None] = [None] * len(new)
    if args.against:
        old, _ = measured(args.against.resolve(), cases, [])
    rows = [
        [spec, chip, str(dim), *cells(a, b)]
        for (spec, chip, dim), a, b in zip(cases, new, old, strict=True)
    ]
    head = ["spec", "chip", "head_dim"]
    head += [f"{kernel} {kind}" for kernel in (*KERNELS, "all") for kind in KINDS]
    versions = ", ".join(f"{x} {version(x)}" for x in ("jax", "jaxlib", "libtpu"))
    print(
        f"python {sys.version.split()[0]}, {versions}\n\nBundles that a tile of "
        f"{BLOCK} x {BLOCK} scores executes, bf16\n\n{table(head, rows)}"
    )
    if used:
        head = ["chip", "HBM", *(f"{k} {s}" for k in KERNELS for s in ("VMEM", "SMEM"))]
        bits = LONG**2 // 8 / 2**20
        print(
            f"\nMemory at {LONG} tokens with a bit for every pair ({bits:.0f} MiB), "
            f"head_dim 128;\nHBM: temporaries of value and gradient\n\n"
            f"{table(head, used)}"
        )


if __name__ == "__main__":
    main()
