"""Bundles of TPU tiles of every size, and what the default tiles cost.

    python benchmarks/tpu_tiles.py --sweep
    python benchmarks/tpu_tiles.py > results/tpu_tiles.txt

The sweep compiles the kernels of ``causal()`` for each chip, head size and tile, and
counts the bundles that a full and a partial tile execute (``lowering.targets.tpu``). No
TPU is needed, and nothing is timed. It takes half an hour.

Without ``--sweep``, a table has the cost of the tiles that ``KernelConfig()`` chooses
for maps of the catalogue, relative to that of the best tile: bundles times visited
tiles, and a fixed number of bundles for each row.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from timing import table

from pallas_kernels.tpu.tiles import ROW_BUNDLES

CHIPS = "tpu-v5e", "tpu-v6e", "tpu7x"
HEAD_DIMS = 64, 128
TILES = (256, 256), (512, 512), (512, 1024), (1024, 512), (1024, 1024)
N, HEADS = 2048, 1
DATA = Path(__file__).parents[1] / "pallas_kernels" / "tpu" / "bundles.json"


def bundles(dump: Path, chip: str, dim: int, tile: tuple[int, int]) -> dict:
    """Bundles ``[full, partial]`` of the forward and the backward kernel."""
    import jax
    import jax.numpy as jnp

    import sadsl as sa
    from lowering.targets import compiling, tpu

    for path in dump.iterdir():
        path.unlink()
    x = jax.ShapeDtypeStruct((1, N, HEADS, dim), jnp.bfloat16)
    config = sa.KernelConfig(block_q=tile[0], block_kv=tile[1])

    def loss(*arrays: Any) -> Any:
        out = sa.attention(*arrays, sa.causal(), impl="tpu", config=config)
        return jnp.sum(out.astype(jnp.float32))

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    compiling.compile_for(grad, (x, x, x), chip)
    found = {}
    for kernel in tpu.read_kernels(dump):
        name = kernel.name.split(".")[0].removeprefix("sadsl_")
        if name in ("forward", "backward"):
            found[name] = [loop.bundles for loop in kernel.loops[:2]]
    return found


def sweep() -> None:
    """Measures all tiles that are not in the file yet."""
    with tempfile.TemporaryDirectory(prefix="tpu_tiles_") as folder:
        from lowering.targets import tpu

        # libtpu reads its flags once in a process, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = tpu.DUMP_FLAGS.format(folder)
        data = json.loads(DATA.read_text()) if DATA.exists() else {}
        for chip in CHIPS:
            for dim in HEAD_DIMS:
                here = data.setdefault(chip, {}).setdefault(str(dim), {})
                for tile in TILES:
                    name = f"{tile[0]}x{tile[1]}"
                    if name in here:
                        continue
                    here[name] = bundles(Path(folder), chip, dim, tile)
                    print(chip, dim, name, here[name], flush=True)
                    DATA.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def choices(chips: list[str], dims: list[int]) -> None:
    """Prints what ``KernelConfig()`` chooses, and its cost relative to the best."""
    import jax
    import jax.numpy as jnp
    from catalog_cases import CASES, Case

    import sadsl as sa
    from sadsl.run.kernels import tile_counts

    short = [
        Case(text, sa.parse(text), n)
        for text in ("causal()", "causal() & window(512)", "blocks(300)", "full()")
        for n in (2048, 8192)
    ]
    data = json.loads(DATA.read_text())

    def cost(low: Any, kernel: str, tile: Any, of_tile: dict) -> float:
        found = tile_counts(low.stages.planned, tile.block_q, tile.block_kv)
        full, partial = of_tile[f"{tile.block_q}x{tile.block_kv}"][kernel]
        rows = found.q_rows if kernel == "forward" else found.kv_rows
        return found.full * full + found.partial * partial + ROW_BUNDLES * rows

    rows, worst = [], 1.0
    for chip in chips:
        for dim in dims:
            of_tile = data[chip][str(dim)]
            for case in (*short, *CASES):
                if any(case.n % size for size in (256, 512, 1024)):
                    continue  # tiles of other sizes were not counted
                x = jax.ShapeDtypeStruct((1, case.n, case.num_heads, dim), jnp.bfloat16)
                lower = partial(sa.lower, case.spec, x, x, x, target=chip)
                row = [case.name, chip, str(dim), str(case.n)]
                chosen = lower()
                fixed = [
                    lower(config=sa.KernelConfig(block_q=q, block_kv=kv))
                    for q, kv in TILES
                ]
                for kernel in ("forward", "backward"):
                    name = "forward" if kernel == "forward" else "dkv"
                    tile = getattr(chosen.tiles, name)
                    costs = {
                        f"{t.block_q} x {t.block_kv}": cost(low, kernel, t, of_tile)
                        for low in fixed
                        for t in [getattr(low.tiles, name)]
                    }
                    best = min(costs, key=costs.__getitem__)
                    ratio = cost(chosen, kernel, tile, of_tile) / costs[best]
                    worst = max(worst, ratio)
                    row += [f"{tile.block_q} x {tile.block_kv}", best, f"{ratio:.2f}"]
                rows.append(row)
    head = ["map", "chip", "head_dim", "n"]
    head += [f"{k} {x}" for k in ("forward", "backward")
             for x in ("default", "best", "default / best")]  # fmt: skip
    print(f"{table(head, rows)}\n\nworst: {worst:.2f}")


def main() -> None:
    """Sweeps, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    args = parser.parse_args()
    if args.sweep:
        sweep()
    else:
        choices(args.chips, args.head_dims)


if __name__ == "__main__":
    main()
