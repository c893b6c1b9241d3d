"""Code of the TPU attention kernels: bundles that one tile executes.

    python benchmarks/tpu_static.py > results/tpu_static.txt
    python benchmarks/tpu_static.py --tables specs --chips tpu-v6e

A bundle is one very long instruction word, so it takes at least one cycle. libtpu
compiles for chips that are not there, in a process of its own, and keeps what it made
(``sa.lower(...).compile()``). Nothing is timed. An empty cache takes an hour.

- ``specs``: the bundles of the loops over full and over partial tiles of 512 x 512,
  with the copies that they start.
- ``splash``: the regions of matrix products of our kernels and of jax's Splash
  attention (fused backward pass), causal, in bundles for 512 x 512 pairs.
- ``traffic``: what the backward pass moves and keeps in HBM, by the model of
  ``lowering.cost`` and by libtpu.
- ``bits``: the memory of kernels that read a bit for every pair, at 131,072 tokens.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from timing import table

import sadsl as sa
from lowering.cost import cost
from lowering.targets import compiling, outside, tpu
from pallas_kernels import dispatch
from pallas_kernels.block_mask import blank
from pallas_kernels.call import WORD, Call, Inputs, Masks, PairBits, Vectors
from pallas_kernels.config import Tile, Tiles

N, LONG, BLOCK = 2048, 131072, 512
SPECS = {
    "causal": sa.causal(),
    "window": sa.causal() & sa.window(512),
    "window, sinks": sa.causal() & (sa.window(512) | sa.sinks(4)),
    "documents": sa.causal() & sa.segments(),
    "dropout": sa.causal(),
    "capped": sa.softmax(sa.causal(), logits_soft_cap=50.0),
    "ALiBi": sa.softmax(sa.causal(), bias=sa.alibi()),
    "learned bias": sa.softmax(sa.causal(), bias=sa.distance_bias("near", left=128)),
    "top keys": sa.causal() & sa.topk(512, block=1, block_q=1),
    "top blocks": sa.causal() & sa.topk(4, block=128),
    "dense mask": sa.parse("where(lambda q, k: operand('mask')[q, k] == 1)"),
}
CHIPS = "tpu-v5e", "tpu-v6e", "tpu7x"
HEAD_DIMS = 64, 128
SIZES = (512, 512), (512, 1024), (1024, 512), (1024, 1024)
# Where the figures of Splash are compared: chip and head_dim.
AGAINST = (
    ("tpu-v6e", 128), ("tpu-v6e", 64), ("tpu7x", 128), ("tpu-v5e", 128), ("tpu-v5e", 64)
)  # fmt: skip


def compiled(
    fn: Callable[..., Any], args: tuple, chip: str
) -> tuple[dict[str, tpu.TpuKernel], dict[str, int]]:
    """The kernels of a compiled program by their names, and its bytes in HBM."""
    found = outside.compile_outside(
        compiling.lower_for(fn, args, chip), chip, timeout=900
    )
    kernels = tpu.kernels_of(found.files)
    return {
        k.name.split(".")[0].removeprefix("sadsl_"): k for k in kernels
    }, found.memory


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array of a call."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def gradient(spec: str, tile: tuple[int, int]) -> Callable[..., Any]:
    """Value and gradient of a spec with one tile for all kernels."""

    def loss(arrays: Any, ids: Any, operands: Any) -> jax.Array:
        config = sa.KernelConfig(block_q=tile[0], block_kv=tile[1])
        given: dict[str, Any] = {"config": config}
        if spec == "documents":
            given |= {"q_segment_ids": ids, "kv_segment_ids": ids}
        if spec == "dropout":
            given |= {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
        if operands:
            given["operands"] = operands
        out = sa.attention(*arrays, SPECS[spec], impl="tpu", **given)
        return jnp.sum(out.astype(jnp.float32))

    return jax.value_and_grad(loss)


def arguments(spec: str, n: int, heads: int, dim: int) -> tuple:
    """The arrays of ``gradient(spec, ...)``."""
    x = shape(1, n, heads, dim)
    operands = {
        "dense mask": {"mask": shape(n, n, dtype=jnp.int32)},
        "learned bias": {"near": shape(1, 129, dtype=jnp.float32)},
    }.get(spec, {})
    return (x, x, x), shape(1, n, dtype=jnp.int32), operands


def rows_of_specs(chips: list[str]) -> Iterator[list[str]]:
    """The table ``specs``."""
    for chip in chips:
        for dim in HEAD_DIMS:
            first: list[int] = []
            for spec in SPECS:
                args = arguments(spec, N, 1, dim)
                kernels, _ = compiled(gradient(spec, (BLOCK, BLOCK)), args, chip)
                both = [kernels[name].loops[:2] for name in ("forward", "backward")]
                counts = [loop.bundles for loops in both for loop in loops]
                first = first or counts
                ratios = [f"{counts[i] / first[i]:.2f}" for i in (1, 3)]
                yield [spec, chip, str(dim), *map(str, counts), *ratios]


def splash_gradient(tile: tuple[int, int], n: int, heads: int) -> Callable[..., Any]:
    """Value and gradient of causal Splash attention, with its fused backward pass."""
    q, kv = tile
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((n, n))] * heads)
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    return jax.value_and_grad(lambda x: jnp.sum(kernel(*x).astype(jnp.float32)))


def regions(
    kernels: dict[str, tpu.TpuKernel], name: str, tile: tuple[int, int]
) -> list[float]:
    """Bundles of each region of products of a kernel, for 512 x 512 pairs."""
    (kernel,) = (k for k in kernels.values() if name in k.name)
    return [x.bundles * BLOCK**2 / (tile[0] * tile[1]) for x in kernel.regions]


def rows_against_splash(chips: list[str]) -> Iterator[list[str]]:
    """The table ``splash``; its last row of a chip has the best of all tiles."""
    n, heads = 8192, 4
    for chip, dim in AGAINST:
        if chip not in chips:
            continue
        best = {"ours": np.inf, "theirs": np.inf}
        for tile in SIZES:
            args = arguments("causal", n, heads, dim)
            ours, _ = compiled(gradient("causal", tile), args, chip)
            flat = (shape(heads, n, dim),) * 3
            theirs, _ = compiled(splash_gradient(tile, n, heads), (flat,), chip)
            row = [chip, str(dim), f"{tile[0]} x {tile[1]}"]
            for mine, other in (("forward", "fwd"), ("backward", "dkv")):
                full, partial, *_ = regions(ours, mine, tile)
                (peer,) = regions(theirs, f"splash_mha_{other}", tile)
                row += [f"{x:.0f}" for x in (full, partial, peer)]
                row += [f"{full / peer:.2f}", f"{partial / peer:.2f}"]
            best["ours"] = min(best["ours"], full)
            best["theirs"] = min(best["theirs"], peer)
            yield row
        ratio = f"{best['ours'] / best['theirs']:.2f}"
        blank_cells = [""] * 5
        numbers = [f"{best['ours']:.0f}", "", f"{best['theirs']:.0f}", ratio, ""]
        yield [chip, str(dim), "best", *blank_cells, *numbers]


def rows_of_traffic(chips: list[str]) -> Iterator[list[str]]:
    """The table ``traffic``: one head of 128 channels, tiles of 512 x 512."""
    chip = chips[-1]
    for n, window in ((8192, 0), (65536, 0), (65536, 4096), (2**20, 0), (2**20, 4096)):
        spec = sa.causal() & sa.window(window) if window else sa.causal()
        x = shape(1, n, 1, 128)
        config = sa.KernelConfig(block_q=BLOCK, block_kv=BLOCK)
        low = sa.lower(spec, x, x, x, target=chip, config=config, gradient=True)
        sizes = cost.CallSizes(
            batch=1, num_q_heads=1, num_kv_heads=1, head_dim=128, head_dim_v=128,
            itemsize=2, impl="tpu",
        )  # fmt: skip
        with compiling.abstract_mesh(chip):
            backward = cost.cost(low.masks, sizes).backward[0]
        memory = low.compile(timeout=900).memory()
        moved = f"{backward.bytes / 1e6:,.0f}"
        kept = f"{memory['temporaries'] / 1e6:,.1f}"
        name = f"causal, window {window}" if window else "causal"
        yield [name, f"{n:,}", moved, kept]


def causal_and_bits(
    test: Any, q: Any, k: Any, q_vectors: tuple, kv_vectors: tuple, bits: tuple
) -> jax.Array:
    """The predicate of ``causal() & topk(...)``, on bits that are given."""
    del test, q_vectors, kv_vectors
    return (k - q <= 0) & bits[0]


def rows_of_bits(chips: list[str]) -> Iterator[list[str]]:
    """The table ``bits``: kernels of a run-time plan with a bit for every pair."""
    tile = Tile(block_q=BLOCK, block_kv=BLOCK)
    call = Call(causal_and_bits, 1.0, Tiles(tile, tile, tile))
    blocks, one = LONG // BLOCK, np.zeros(1, np.int32)
    masks = [
        replace(blank(LONG, LONG, BLOCK, BLOCK, by), map_of_head=one, test_of_map=one)
        for by in ("q", "kv")
    ]

    def ints(*sizes: int) -> jax.ShapeDtypeStruct:
        return shape(*sizes, dtype=jnp.int32)

    words = ints(1, 1, blocks, BLOCK // WORD, LONG)
    bits = PairBits(words, ints(LONG), BLOCK, keys_per_bit=1)
    x = shape(1, 1, LONG, 128)
    runs = {f"run_{name}": ints(blocks**2 // 2) for name in ("start", "stop", "full")}

    def loss(inputs: Inputs, bits: PairBits, runs: Any) -> jax.Array:
        rows, columns = (replace(m, max_runs=blocks, **runs) for m in masks)
        plans, vectors = Masks(rows, rows, columns), Vectors(bits=(bits,))
        out = dispatch.attend(inputs, vectors, plans, call, impl="tpu")
        return jnp.sum(out.o.astype(jnp.float32))

    args = Inputs(x, x, x), bits, runs | {"row_ptr": ints(blocks + 1)}
    for chip in chips:
        kernels, memory = compiled(jax.grad(loss), args, chip)
        row = [chip, f"{memory['temporaries'] / 2**20:.0f} MiB"]
        for name in ("forward", "backward"):
            sizes = kernels[name].vmem, kernels[name].smem
            row += [f"{x / 1024:.0f} KiB" for x in sizes]
        yield row


# Of each table: its title, its head, and the function of its rows.
KINDS = [f"{k} {kind}" for k in ("forward", "backward") for kind in ("full", "partial")]
TABLES: dict[str, tuple[str, list[str], Callable[..., Iterator[list[str]]]]] = {
    "specs": (
        f"Bundles that a tile of {BLOCK} x {BLOCK} executes, bf16; partial tiles "
        "relative to causal()",
        ["spec", "chip", "head_dim", *KINDS, "forward / causal", "backward / causal"],
        rows_of_specs,
    ),
    "splash": (
        "Regions of products, causal, bf16: bundles for 512 x 512 pairs",
        ["chip", "head_dim", "tile"]
        + [
            f"{way} {x}"
            for way in ("fwd", "bwd")
            for x in ("full", "partial", "splash", "full / splash", "partial / splash")
        ],
        rows_against_splash,
    ),
    "traffic": (
        "Backward pass of one head of 128 channels, bf16: MB that it moves (model) and "
        "HBM beside arguments and results (libtpu, value and gradient)",
        ["spec", "n", "MB moved", "MB kept"],
        rows_of_traffic,
    ),
    "bits": (
        f"Memory at {LONG} tokens with a bit for every pair "
        f"({LONG**2 // 8 / 2**20:.0f} MiB), head_dim 128; HBM: temporaries of value "
        "and gradient",
        ["chip", "HBM"]
        + [f"{k} {s}" for k in ("forward", "backward") for s in ("VMEM", "SMEM")],
        rows_of_bits,
    ),
}


def main() -> None:
    """Compiles, counts, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    args = parser.parse_args()
    versions = ", ".join(f"{x} {version(x)}" for x in ("jax", "jaxlib", "libtpu"))
    print(f"python {sys.version.split()[0]}, {versions}")
    for name in args.tables:
        title, head, rows = TABLES[name]
        print(f"\n{title}\n\n{table(head, list(rows(args.chips)))}", flush=True)


if __name__ == "__main__":
    main()
