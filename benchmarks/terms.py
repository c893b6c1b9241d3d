"""The cost of merging terms on a CPU: a joint against the sum of its parts.

    python benchmarks/terms.py [--longest 16384] [--rounds 7] > results/terms.txt

The parts are those that the joint runs (``Joint.resolved``), or the outputs of
``gated``; each is a call of its own that also returns its log-sum-exp. All calls of a
line alternate in one run: median milliseconds, f32, batch 1. "backward" includes the
gradients of q, k and v. The last lines compare Combiner-Fixed with dense causal
attention by the same kernels.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternating, machine, medians, stopwatch, table

import sadsl as sa
from sadsl import catalog
from sadsl.terms.base import Spec, Term, read_by
from sadsl.terms.mixtures import Joint

HEADS, HEAD_DIM = 2, 64
LENGTHS = (4096, 16384)
LIMIT = 0.05


class Line(NamedTuple):
    """One term at one length: median milliseconds of the whole, and of its parts.

    ``overhead`` is the time that the whole takes beyond its parts, as a share of them.
    It is the median over the rounds, since a round's calls share the state of the
    machine.
    """

    name: str
    n: int
    passes: str
    whole: float
    parts: tuple[float, ...]
    overhead: float


def span_of(n: int) -> int:
    """The power of two next to ``sqrt(2 n)``, at which Fixed is cheapest."""
    return 1 << round(math.log2(2 * n) / 2)


def cases(n: int) -> dict[str, Term]:
    """Mixtures that no single plan could be as cheap as, and one of other terms."""
    near = sa.causal() & sa.window(256)
    far = sa.causal() & sa.strided(64)
    return {
        "window + strided": sa.joint(near, far),
        "window + capped sinks": sa.joint(
            near, sa.softmax(sa.causal() & sa.sinks(512), logits_soft_cap=30.0)
        ),
        "Combiner-Fixed": catalog.combiner_fixed(span_of(n)),
        "gated window + linear": sa.gated(near, sa.linear()),
    }


def parts_of(term: Term, n: int) -> tuple[Spec, ...]:
    """The terms that run; the given terms where they run as one plan."""
    if not isinstance(term, Joint):
        return term.parts
    found = term.resolved(n, num_heads=HEADS)
    return found if len(found) > 1 else term.parts


def arrays(n: int, num_parts: int) -> tuple[tuple[jax.Array, ...], jax.Array, Any]:
    """q, k and v, a cotangent, and gates."""
    rng = np.random.default_rng(0)
    shape = 1, n, HEADS, HEAD_DIM
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in "qkvo")
    gates = jnp.asarray(rng.random((1, n, HEADS, num_parts), np.float32))
    return (q, k, v), do, {"gates": gates}


def call(spec: Spec, lse: bool) -> Callable[..., Any]:
    """A call, with the log-sum-exp that merging reads."""

    def run(q: Any, k: Any, v: Any, given: Mapping[str, Any]) -> Any:
        given = read_by(spec, given)
        return sa.attention(q, k, v, spec, operands=given, return_lse=lse)

    return run


def sides(
    specs: Mapping[str, tuple[Spec, bool]], n: int, num_parts: int, backward: bool
) -> dict[str, Callable[[], float]]:
    """Stopwatches of compiled calls; a flag says whether one yields its lse too."""
    inputs, do, given = arrays(n, num_parts)
    of_lse = do[..., 0].swapaxes(1, 2)
    found = {}
    for name, (spec, lse) in specs.items():
        run = call(spec, lse)

        def both(
            inputs: Any, given: Any, pulled: Any, run: Callable = run
        ) -> tuple[Any, Any]:
            out, pull = jax.vjp(lambda q, k, v: run(q, k, v, given), *inputs)
            return out, pull(pulled)

        pulled = (do, of_lse) if lse else do
        found[name] = (
            stopwatch(jax.jit(both), inputs, given, pulled)
            if backward
            else stopwatch(jax.jit(run), *inputs, given)
        )
    return found


def measure(name: str, term: Term, n: int, rounds: int) -> list[Line]:
    """The term and its parts, forward and with backward."""
    parts = parts_of(term, n)
    merged = isinstance(term, Joint)
    specs: dict[str, tuple[Spec, bool]] = {"whole": (term, False)}
    specs |= {f"part {i}": (part, merged) for i, part in enumerate(parts)}
    lines = []
    for passes, backward in (("forward", False), ("and backward", True)):
        timed = sides(specs, n, len(parts), backward)
        ms = np.array(list(alternating(timed, rounds).values()))
        overhead = float(np.median(ms[0] / ms[1:].sum(axis=0))) - 1
        whole, *rest = np.median(ms, axis=1).tolist()
        lines.append(Line(name, n, passes, whole, tuple(rest), overhead))
    return lines


def against_dense(n: int, rounds: int) -> list[list[str]]:
    """Combiner-Fixed and dense causal attention: milliseconds, and the ratio."""
    specs = {"Combiner-Fixed": (catalog.combiner_fixed(span_of(n)), False)}
    specs["dense"] = sa.causal(), False
    rows = []
    for passes, backward in (("forward", False), ("and backward", True)):
        fixed, dense = medians(sides(specs, n, 1, backward), rounds).values()
        ratio = f"{dense / fixed:.1f} x"
        rows.append([str(n), passes, f"{fixed:.1f}", f"{dense:.1f}", ratio])
    return rows


def merged_rows(lines: Sequence[Line]) -> list[list[str]]:
    """The lines as cells."""
    return [
        [
            line.name, str(line.n), line.passes, f"{line.whole:.1f}",
            " + ".join(f"{x:.1f}" for x in line.parts), f"{sum(line.parts):.1f}",
            f"{line.overhead:+.1%}",
        ]
        for line in lines
    ]  # fmt: skip


def main() -> None:
    """Measures, and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="a mixture by name; all if not given")
    args = parser.parse_args()
    lengths = [n for n in LENGTHS if n <= args.longest] or [args.longest]
    lines = [
        line
        for n in lengths
        for name, term in cases(n).items()
        if args.only in (None, name)
        for line in measure(name, term, n, args.rounds)
    ]
    print(machine("jax", "sadsl"))
    print(f"{HEADS} heads of {HEAD_DIM}, milliseconds\n")
    head = ["", "n", "passes", "merged", "parts", "sum of parts", "merging costs"]
    print(table(head, merged_rows(lines)))
    worst = max(line.overhead for line in lines)
    print(f"\nmerging costs {worst:+.1%} at most; wanted: {LIMIT:+.0%} at most\n")
    rows = [row for n in lengths for row in against_dense(n, args.rounds)]
    print(table(["n", "passes", "Combiner-Fixed", "dense causal", "ratio"], rows))


if __name__ == "__main__":
    main()
