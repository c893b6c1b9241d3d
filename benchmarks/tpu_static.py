"""Code of the TPU attention kernels: bundles that one tile executes.

    python benchmarks/tpu_static.py > results/tpu_static.txt
    python benchmarks/tpu_static.py --against ../other/checkout

A bundle is one very long instruction word, so it takes at least one cycle. A kernel has
one innermost loop over tiles without a test (full) and one over tiles with a test
(partial). The scheduled code of libtpu shows these loops. Every bundle of such a loop
is counted, also those that start the next copy. A third loop, which repeats a walk
because a sum was not finite, comes after these two and is not counted. No TPU is
needed, and nothing is timed.

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from timing import table

import sadsl as sa
from lowering.cost import targets

N = 2048
BLOCK = 512
SPECS = {
    "causal": sa.causal(),
    "window": sa.window(512),
    "documents": sa.causal() & sa.segments(),
    "capped": sa.softmax(sa.causal(), logits_soft_cap=50.0),
    "ALiBi": sa.softmax(sa.causal(), bias=sa.alibi()),
}
CHIPS = "tpu-v5e", "tpu-v6e"
HEAD_DIMS = 64, 128
KERNELS = "forward", "dq", "dkv"
KINDS = "full", "partial"
# A bundle: perhaps the mark of a loop's first one, a ">" for each loop, instructions.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0) +(LB|LH)?.*?: (>*) ?\{(.*)\}")

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

    def loss(arrays: Any, ids: Any) -> jax.Array:
        given = {"config": sa.KernelConfig(block_q=BLOCK, block_kv=BLOCK)}
        if spec == "documents":
            given |= {"q_segment_ids": ids, "kv_segment_ids": ids}
        out = sa.attention(*arrays, SPECS[spec], impl="tpu", **given)
        return jnp.sum(out.astype(jnp.float32))

    targets.compile_for(jax.value_and_grad(loss), ((x, x, x), ids), chip)


def counts(dump: Path, cases: list[tuple[str, str, int]]) -> list[Counts]:
    """The bundles of each case, whose code libtpu writes to ``dump``."""
    found = []
    for case in cases:
        before = set(dump.iterdir())
        compiled(*case)
        new = [x for x in dump.iterdir() if x not in before]
        of_case: Counts = []
        for kernel in KERNELS:
            (code,) = (
                x for x in new
                if f"-sadsl_{kernel}." in x.name
                and x.name.endswith("final_bundles.txt")
                and "schedule-analysis" not in x.name
            )  # fmt: skip
            found_loops = loops(code.read_text())
            if len(found_loops) < len(KINDS):
                raise RuntimeError(f"{code}: {len(found_loops)} loops over tiles")
            of_case += found_loops[: len(KINDS)]
        found.append(of_case)
    return found


def measured(root: Path, cases: list[tuple[str, str, int]]) -> list[Counts]:
    """``counts`` in the checkout ``root``."""
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
        run = subprocess.run(
            command, input=json.dumps(cases), env=env, text=True, capture_output=True
        )
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


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
        print(json.dumps(counts(args.child, json.load(sys.stdin))))
        return
    cases = [
        (spec, chip, dim)
        for chip in args.chips
        for dim in args.head_dims
        for spec in args.specs
    ]
    here = Path(sa.__file__).parents[1]
    new = measured(here, cases)
    old = measured(args.against.resolve(), cases) if args.against else [None] * len(new)
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


if __name__ == "__main__":
    main()
