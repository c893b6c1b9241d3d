"""Local linear attention on a CPU: its time beside softmax, and its linear systems.

    python benchmarks/local_linear.py [--longest 8192] > results/local_linear.txt

f32, batch 1; "and backward" includes the gradients of q, k and v. Ratios are medians
over rounds in which both sides alternate. Keys have length 1 (in the mean), their
channels have standard deviations that fall as 1 / channel, queries are near keys, and
sm_scale is 8.

- Time: ``local_linear(map)`` against ``softmax(map)``, on one plan.
- Forming or iterating: how many iterations of conjugate gradients take the time that
  forming and factoring the covariances takes (``pallas_kernels/solve.py``).
- Residuals: the greatest one by ridge and iterations, and as the term solves by itself;
  and then the error of the output against the dense definition in float64.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternating, machine, stopwatch, table

import sadsl as sa
from pallas_kernels import solve

HEADS, ROUNDS, SCALE = 4, 3, 8.0
MAPS = {"causal": sa.causal(), "window": sa.causal() & sa.window(256)}
SIZES = (
    (64, 2048, "causal"), (64, 2048, "window"), (64, 8192, "window"),
    (128, 2048, "causal"), (128, 2048, "window"),
)  # fmt: skip
RIDGE = 0.1
# No f32 system meets this, so that all iterations run.
NEVER = 1e-30


def arrays(n: int, dim: int, heads: int = HEADS) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent, ``[1, n, heads, dim]``."""
    rng = np.random.default_rng(0)
    spread = 1 / np.arange(1, dim + 1)
    spread *= (dim / np.square(spread).sum()) ** 0.5
    noise = rng.normal(size=(4, 1, n, heads, dim))
    k = noise[0] * spread / dim**0.5
    q = 0.7 * k + 0.7 * noise[1] * spread / dim**0.5
    made = q, k, np.tanh(k) + 0.1 * noise[2], noise[3]
    return tuple(jnp.asarray(x, jnp.float32) for x in made)


def side(spec: Any, inputs: tuple[jax.Array, ...], *, backward: bool) -> Callable:
    """A stopwatch of one compiled call."""
    *qkv, do = inputs
    call = partial(sa.attention, spec=spec, sm_scale=SCALE, impl="xla")

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(do)

    return stopwatch(jax.jit(both if backward else call), *qkv)


def times(longest: int) -> str:
    """Milliseconds, and ratios to softmax on the same plan."""
    rows = []
    for dim, n, name in SIZES:
        if n > longest:
            continue
        specs = {"softmax": MAPS[name], "local": sa.local_linear(MAPS[name], RIDGE)}
        row = [name, str(dim), str(n)]
        for backward in (False, True):
            sides = {
                x: side(spec, arrays(n, dim), backward=backward)
                for x, spec in specs.items()
            }
            ms = np.array(list(alternating(sides, ROUNDS).values()))
            row += [f"{x:.0f}" for x in np.median(ms, axis=1)]
            row.append(f"{np.median(ms[1] / ms[0]):.1f} x")
        rows.append(row)
    head = "map", "head_dim", "n", "softmax", "local linear", "ratio"
    return table([*head, "and backward", "local linear", "ratio"], rows)


def forming(n: int) -> str:
    """The iterations that cost as much as forming, by head_dim."""
    usual, rows = solve.SMALL, []
    for dim in (32, 64, 128):
        few, more, inputs = dim // 8, 3 * dim // 8, arrays(n, dim)
        sides = {
            count: side(
                sa.local_linear(MAPS["window"], RIDGE, NEVER, count), inputs,
                backward=False,
            )
            for count in (few, more)
        }  # fmt: skip
        sides[dim] = side(
            sa.local_linear(MAPS["window"], RIDGE, NEVER), inputs, backward=False
        )
        # Read when a call is traced: all systems are formed at once.
        solve.SMALL = dim
        sides[dim]()
        solve.SMALL = usual
        ms = {x: float(np.median(y)) for x, y in alternating(sides, ROUNDS).items()}
        each = (ms[more] - ms[few]) / (more - few)
        equal = few + (ms[dim] - ms[few]) / each
        cells = f"{each:.1f}", f"{ms[dim]:.0f}", f"{equal:.0f}", f"{equal / dim:.2f}"
        rows.append([str(dim), *cells])
    head = "head_dim", "an iteration", "call that forms", "as iterations"
    return table([*head, "of head_dim"], rows)


def residuals(n: int, dim: int) -> str:
    """The greatest residuals, by ridge and iterations, and the error of the output."""
    counts = 4, 8, 16, 32
    q, k, v, _ = arrays(n, dim, heads=1)
    rows = []
    for ridge in (1.0, 0.1, 0.01, 0.001):
        terms = [sa.local_linear(sa.causal(), ridge, NEVER, count) for count in counts]
        usual = sa.local_linear(sa.causal(), ridge)
        found = [
            sa.local_linear_residual(term, q, k, sm_scale=SCALE)
            for term in (*terms, usual)
        ]
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
            exact = sa.attention(*wide, usual, sm_scale=SCALE, impl="reference")
            exact = np.asarray(exact)
        out = jax.jit(partial(sa.attention, spec=usual, sm_scale=SCALE))(q, k, v)
        error = np.abs(np.asarray(out) - exact).max() / np.abs(exact).max()
        each = (f"{float(x.max()):.0e}" for x in found)
        rows.append([f"{ridge}", *each, f"{error:.0e}"])
    head = "ridge", *map(str, counts), "by itself", "error of o"
    return table(head, rows)


def main() -> None:
    """Measures, and prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=8192)
    args = parser.parse_args()
    print(f"{machine('jax', 'sadsl')}, load {os.getloadavg()[0]:.0f}")
    print(f"{HEADS} heads, ridge {RIDGE}, tolerance 1e-4, milliseconds\n")
    print(times(args.longest), "\n")
    print("window(256), n = 2048: one iteration, and a call that forms all systems\n")
    print(forming(2048), "\n")
    print("causal, n = 512, head_dim 128: greatest residuals by iterations\n")
    print(residuals(512, 128))


if __name__ == "__main__":
    main()
