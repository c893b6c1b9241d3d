"""Time of one token against the slots of its cache, by the position that is reached.

    python benchmarks/few_queries.py > results/few_queries.txt
    python benchmarks/few_queries.py --slots 4096 --dtype bfloat16

The ordinary path takes the same cache with its heads moved behind the positions, as
``sadsl.attention`` reads it. The position is a traced array: one program serves all.
"""

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternating, machine, stopwatch, table

import sadsl as sa
from sadsl.run import traced_offset
from sadsl.run.attend import attend
from sadsl.run.few_queries import attend_few
from sadsl.run.types import Setting
from sadsl.text.specs import any_term

SPECS = {
    "causal": sa.causal(),
    "window": sa.causal() & (sa.window(511) | sa.sinks(4)),
}
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64


def paged(x: jax.Array, size: int, order: np.ndarray) -> jax.Array:
    """A cache of one sequence in pages, ``order[j]`` of which holds part ``j``."""
    _, heads, _, dim = x.shape
    pages = jnp.swapaxes(x.reshape(heads, -1, size, dim), 0, 1)
    return pages[np.argsort(order)]


def rows(slots: int, dtype: str, repeats: int) -> list[list[str]]:
    """A row of the table for each map and position."""
    rng, size = np.random.default_rng(0), 256
    shapes = (1, 1, HEADS, HEAD_DIM), *(((1, KV_HEADS, slots, HEAD_DIM),) * 2)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    order = rng.permutation(slots // size)
    in_pages = paged(k, size, order), paged(v, size, order)
    pages = jnp.asarray(order[None], jnp.int32)
    setting, found = Setting(HEAD_DIM**-0.5), []
    for name, spec in SPECS.items():

        def bound(at: jax.Array, spec: Any = spec) -> Any:
            return traced_offset.with_offset(any_term(spec), at, {}, 1)

        @jax.jit
        def few(q: Any, k: Any, v: Any, at: Any, pages: Any = None) -> Any:
            term, given = bound(at)
            return attend_few(term, (q, k, v), given, setting, pages).out

        @jax.jit
        def ordinary(q: Any, k: Any, v: Any, at: Any) -> Any:
            term, given = bound(at)
            keys = (jnp.swapaxes(x, 1, 2) for x in (k, v))
            return attend(term, (q, *keys), given, setting).out

        for at in sorted({100, slots // 4, slots - 1}):
            position = jnp.int32(at)
            sides = {
                "few": stopwatch(few, q, k, v, position),
                "paged": stopwatch(few, q, *in_pages, position, pages),
                "ordinary": stopwatch(ordinary, q, k, v, position),
            }
            rounds = alternating(sides, repeats).values()
            times = [f"{statistics.median(x):.2f}" for x in rounds]
            found.append([name, str(slots), str(at), *times])
    return found


def main() -> None:
    """Times, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    body = [
        row for slots in args.slots for row in rows(slots, args.dtype, args.repeats)
    ]
    head = ["map", "slots", "position", "few queries", "in pages", "ordinary path"]
    print(
        f"One query, {HEADS} query heads, {KV_HEADS} key heads, head_dim {HEAD_DIM}, "
        f"{args.dtype}; milliseconds, median of {args.repeats} calls"
        f"\n{machine('jax', 'jaxlib')}\n\n{table(head, body)}"
    )


if __name__ == "__main__":
    main()
