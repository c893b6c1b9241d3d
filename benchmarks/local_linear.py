"""Local linear attention on a CPU: its time beside softmax, and its linear systems.

    python benchmarks/local_linear.py [--longest 8192] > results/local_linear.txt

f32, batch 1; "and backward" includes the gradients of q, k and v. Ratios are medians
over rounds in which both sides alternate. Keys have length 1 (in the mean), their
channels have standard deviations that fall as 1 / channel, and queries are near keys.

- Time: ``local_linear(map)`` against ``softmax(map)``, on one plan.
- Forming or iterating: how many iterations of conjugate gradients take the time that
  forming and factoring the covariances takes (``pallas_kernels/solve.py``).
- Residuals: the greatest one by ridge and iterations, and the greatest error of the
  output against the dense definition in float64, relative to its greatest entry.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternating, machine, stopwatch, table

import sadsl as sa
from pallas_kernels import solve

HEADS, ROUNDS = 4, 3
LENGTHS = 2048, 8192
MAPS = {"causal": sa.causal(), "window": sa.causal() & sa.window(256)}
RIDGE = 0.1
# No f32 system meets this, so that all iterations run.
NEVER = 1e-12


def arrays(n: int, dim: int, heads: int = HEADS) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent, ``[1, n, heads, dim]``."""
    rng = np.random.default_rng(0)
    spread = 1 / np.arange(1, dim + 1)
    spread *= (dim / np.square(spread).sum()) ** 0.5
    noise = rng.normal(size=(4, 1, n, heads, dim))
    k = noise[0] * spread
    q = 0.7 * k + 0.7 * noise[1] * spread
    made = q, k, np.tanh(k) + 0.1 * noise[2], noise[3]
    return tuple(jnp.asarray(x, jnp.float32) for x in made)


def side(spec: Any, inputs: tuple[jax.Array, ...], *, backward: bool) -> Callable:
    """A stopwatch of one compiled call."""
    *qkv, do = inputs
    call = partial(sa.attention, spec=spec, impl="xla")

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(do)

    return stopwatch(jax.jit(both if backward else call), *qkv)


def times(longest: int) -> str:
    """Milliseconds, and ratios to softmax on the same plan."""
    rows = []
    for dim, n in [(d, n) for d in (64, 128) for n in LENGTHS if n <= longest]:
        for name, map_ in MAPS.items():
            if dim == 128 and n > LENGTHS[0]:
                continue
            specs = {"softmax": map_, "local": sa.local_linear(map_, RIDGE)}
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
    usual, rows = solve.LARGEST_FORMED, []
    for dim in (32, 64, 128):
        few, more = dim // 8, 3 * dim // 8
        inputs = arrays(n, dim)
        # Read when a call is traced.
        solve.LARGEST_FORMED = dim
        sides = {}
        for count in (few, more, dim):
            spec = sa.local_linear(MAPS["window"], RIDGE, NEVER, count)
            sides[count] = side(spec, inputs, backward=False)
            sides[count]()
        solve.LARGEST_FORMED = usual
        ms = {x: float(np.median(y)) for x, y in alternating(sides, ROUNDS).items()}
        each = (ms[more] - ms[few]) / (more - few)
        equal = few + (ms[dim] - ms[few]) / each
        cells = f"{each:.1f}", f"{ms[dim]:.0f}", f"{equal:.0f}", f"{equal / dim:.2f}"
        rows.append([str(dim), *cells])
    head = "head_dim", "an iteration", "formed, whole call", "as iterations"
    return table([*head, "of head_dim"], rows)


def residuals(n: int) -> str:
    """Residuals and errors of 128 unknowns, by ridge and iterations."""
    counts = 8, 16, 32, 64
    q, k, v, _ = arrays(n, 128, heads=1)
    rows = []
    for ridge in (1.0, 0.1, 0.01):
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
            term = sa.local_linear(sa.causal(), ridge)
            exact = np.asarray(sa.attention(*wide, term, impl="reference"))
        cells = []
        for count in counts:
            # Ends early only where that is within rounding.
            term = sa.local_linear(sa.causal(), ridge, 2e-7, count)
            residual = np.asarray(sa.local_linear_residual(term, q, k)).max()
            loose = sa.local_linear(sa.causal(), ridge, 1 - 1e-6, count)
            del loose
            cells.append(f"{residual:.0e}")
        rows.append([f"{ridge}", *cells, f"{np.abs(exact).max():.1f}"])
    return table(["ridge", *(f"{c} iterations" for c in counts), "o"], rows)


def main() -> None:
    """Measures, and prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    args = parser.parse_args()
    print(machine("jax", "sadsl"))
    print(f"{HEADS} heads, ridge {RIDGE}, tolerance 1e-4, milliseconds\n")
    print(times(args.longest), "\n")
    print("window(256), n = 2048: milliseconds of one iteration, and of a call that")
    print("forms its systems; the iterations that take as long\n")
    print(forming(2048), "\n")
    print("causal, n = 512, head_dim 128: the greatest residual by iterations\n")
    print(residuals(512))


if __name__ == "__main__":
    main()
