"""Time of one token against the length of the cache, beside Flax's own decoding.

    python benchmarks/decode.py [--lengths 2048 8192 32768] [--tokens 40]

On a CPU, f32, 8 query heads of 64 on 2 key heads, one sequence whose cache is full but
for the tokens that are timed. Columns are microseconds of a token, the least of the
tokens, whose columns alternate; the bytes of the cache. The cache is donated, so that a
token is written in place. ``window`` is ``causal() & (window(1023) | sinks(4))``. The
last column is Flax's ``MultiHeadAttention(decode=True)``, its projections included,
with 8 heads of keys: its attention reads the whole cache at every position. The last
line has the exponents of time in the length, from each length to the next.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import machine, table

import sadsl as sa

HEADS, KV_HEADS, DIM = 8, 2, 64
SPECS: dict[str, Any] = {
    "window": sa.causal() & (sa.window(1023) | sa.sinks(4)),
    "causal": sa.causal(),
    "half": sa.causal() & sa.where(lambda q, k: k // 512 % 2 == 0),
    "linear": sa.linear(),
}


def normal(*shape: int) -> jax.Array:
    """Random numbers."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def of_spec(spec: Any, length: int, tokens: int) -> tuple[Callable[[], Any], int]:
    """A function that decodes one token, and the bytes of its cache."""
    step = jax.jit(sa.step, donate_argnums=0)
    cache = sa.init_cache(spec, 1, length, KV_HEADS, DIM, num_heads=HEADS)
    size = cache.nbytes
    cache = jax.tree.map(lambda x: normal(*x.shape).astype(x.dtype), cache)
    cache = replace(cache, length=jnp.int32(length - tokens - 1))
    q = normal(1, HEADS, DIM)
    kv = normal(1, KV_HEADS, DIM)
    held = [cache]

    def run() -> None:
        held[0], out = step(held[0], q, kv, kv)
        out.block_until_ready()

    return run, size


def of_flax(length: int) -> tuple[Callable[[], Any], int]:
    """The same for Flax's own layer and cache."""
    layer = nnx.MultiHeadAttention(
        HEADS, HEADS * DIM, decode=True, use_bias=False, rngs=nnx.Rngs(0)
    )
    layer.init_cache((1, length, HEADS * DIM))
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(layer, nnx.Cache)))
    step = nnx.jit(lambda layer, x: layer(x), donate_argnums=0)
    x = normal(1, 1, HEADS * DIM)

    def run() -> None:
        step(layer, x).block_until_ready()

    return run, size


def measured(length: int, tokens: int) -> Iterator[tuple[str, float, int]]:
    """The least time of a token in microseconds, and the bytes of the cache."""
    runs = {name: of_spec(spec, length, tokens) for name, spec in SPECS.items()}
    runs["flax"] = of_flax(length)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(tokens):
        for name, (run, _) in runs.items():
            start = perf_counter()
            run()
            times[name].append(perf_counter() - start)
    for name, (_, size) in runs.items():
        # The first token is compiled.
        yield name, 1e6 * min(times[name][1:]), size


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    print(machine())
    found = {n: list(measured(n, args.tokens)) for n in args.lengths}
    names = [name for name, _, _ in found[args.lengths[0]]]
    for what, at, form in (
        ("us a token", 1, "{:,.0f}"),
        ("KiB of cache", 2, "{:,.0f}"),
    ):
        rows = []
        for n, each in found.items():
            values = [x[at] / (1024 if at == 2 else 1) for x in each]
            rows.append([f"{n:,}", *(form.format(x) for x in values)])
        print(table([what, *names], rows))
    rows = []
    for a, b in pairwise(args.lengths):
        ratio = [
            np.log(y[1] / x[1]) / np.log(b / a)
            for x, y in zip(found[a], found[b], strict=True)
        ]
        rows.append([f"{a:,} to {b:,}", *(f"{x:.2f}" for x in ratio)])
    print(table(["exponent", *names], rows))


if __name__ == "__main__":
    main()
