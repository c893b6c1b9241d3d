"""``sadsl bench``: a call on this machine beside ``jax.nn.dot_product_attention``.

Both sides run in turns, so that what else the machine does slows both. A ratio is of
the two times of one round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lowering.facts.plan_counts import Plan
from lowering.targets.report import ReportTable
from sadsl.cli import machine
from sadsl.cli.call import arrays, config, kv_seq_len, segment_lengths
from sadsl.cli.command import CommandResult
from sadsl.cli.progress import progress
from sadsl.maps.named import causal, full
from sadsl.run.call import attention
from sadsl.run.plans import plan
from sadsl.terms.base import Spec
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term, map_of

OURS, DENSE = "sadsl", "jax.nn"
PASSES = "forward", "forward and gradient"
# Segment ids of a benchmark are those of so many documents of one length.
DOCUMENTS = 4
SEED = 0


@dataclass(frozen=True)
class Baseline:
    """How ``jax.nn`` is called: ``same`` says whether it computes the same function."""

    words: str
    is_causal: bool
    mask: np.ndarray | None
    same: bool


def bench(asked: flags.FlagValues, spec: Spec) -> CommandResult:
    """Times a call and its gradient, each in rounds that alternate with dense ones.

    Raises:
      ValueError: dense attention of this size does not fit into memory.
    """
    ids = {
        name: np.arange(n, dtype=np.int32) * DOCUMENTS // n
        for name, n in segment_lengths(spec, asked).items()
    }
    with progress("planning"):
        baseline = _baseline(spec, asked, ids)
    inputs = _inputs(asked, baseline)
    sides = _sides(spec, asked, baseline, ids)
    ready = {side: _compiled(side, f, inputs) for side, f in sides.items()}
    difference = None
    if baseline.same:
        ours, dense = (ready[side][0](*inputs) for side in (OURS, DENSE))
        difference = _difference(ours, dense, baseline.mask)
    passes = []
    for number, name in enumerate(PASSES):
        runs = {side: of[number] for side, of in ready.items()}
        ms = _alternating(runs, inputs, asked.rounds, name)
        passes.append(_figures(name, ms, {s: _temporary(f) for s, f in runs.items()}))
    values = {
        "machine": {"cpu": machine.cpu(), "devices": machine.devices()},
        "jax": jax.__version__,
        "spec": repr(spec),
        "call": _call_text(asked, ids),
        "baseline": baseline.words,
        "largest_difference": difference,
        "rounds": asked.rounds,
        "passes": passes,
    }
    return CommandResult(_text(values), values)


def _baseline(
    spec: Spec, asked: flags.FlagValues, ids: dict[str, np.ndarray]
) -> Baseline:
    """What dense attention computes: the same function wherever it can say it."""
    term, seen = any_term(spec), map_of(spec)
    known: Plan = plan(
        seen, asked.seq_len, kv_seq_len(asked), num_heads=asked.heads, relayout=False
    )
    plain = term == Softmax(seen) and set(known.operands) <= set(ids)
    for simple in (causal(), full()):
        if plain and seen == simple:
            words = f"is_causal={simple == causal()}"
            return Baseline(words, simple == causal(), None, True)
    if not plain:
        words = "is_causal=True, which is another function"
        return Baseline(words, True, None, False)
    _check_memory("the mask", asked.heads * asked.seq_len * kv_seq_len(asked))
    mask = seen.dense(asked.seq_len, kv_seq_len(asked), asked.heads, operands=ids)
    if known.mask.num_maps == 1:
        mask = mask[:1]
    return Baseline("the same pairs as a mask", False, mask[None], True)


def _inputs(asked: flags.FlagValues, baseline: Baseline) -> tuple[Any, ...]:
    """Random q, k, v, the cotangent of the output, and the mask or None."""
    q, k, v = arrays(asked)
    cotangent = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    keys = jax.random.split(jax.random.key(SEED), 4)
    made = (
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, (q, k, v, cotangent), strict=True)
    )
    mask = None if baseline.mask is None else jnp.asarray(baseline.mask)
    return (*made, mask)


def _sides(
    spec: Spec, asked: flags.FlagValues, baseline: Baseline, ids: dict[str, np.ndarray]
) -> dict[str, tuple[Any, Any]]:
    """The forward pass, and the pass with gradients, of each side."""
    rows = {
        name: jnp.asarray(x)[None].repeat(asked.batch, 0) for name, x in ids.items()
    }

    def ours(q: Any, k: Any, v: Any, mask: Any) -> Any:
        del mask
        return attention(q, k, v, spec, config=config(asked), operands=rows)

    def dense(q: Any, k: Any, v: Any, mask: Any) -> Any:
        causal_only = baseline.is_causal
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal_only)

    def passes(f: Callable[..., Any]) -> tuple[Any, Any]:
        def forward(q: Any, k: Any, v: Any, cotangent: Any, mask: Any) -> Any:
            del cotangent
            return f(q, k, v, mask)

        def gradient(q: Any, k: Any, v: Any, cotangent: Any, mask: Any) -> Any:
            out, pull = jax.vjp(lambda q, k, v: f(q, k, v, mask), q, k, v)
            return out, pull(cotangent)

        # What a side does not read is no argument of the compiled program.
        return jax.jit(forward), jax.jit(gradient)

    # Dense attention comes first, since it is what may not fit into memory.
    return {DENSE: passes(dense), OURS: passes(ours)}


def _compiled(side: str, functions: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The passes of a side as compiled programs.

    Raises:
      ValueError: one needs more memory than is free.
    """
    found = []
    for name, function in zip(PASSES, functions, strict=True):
        with progress(f"compiling {side}, {name}"):
            found.append(function.lower(*inputs).compile())
        if jax.default_backend() == "cpu":
            _check_memory(side, _temporary(found[-1]))
    return found


def _temporary(compiled: Any) -> int:
    found = compiled.memory_analysis()
    return 0 if found is None else int(found.temp_size_in_bytes)


def _check_memory(what: str, needed: int) -> None:
    free = machine.memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{what} needs {needed / 2**30:.1f} GiB of memory for this call, and "
            f"{free / 2**30:.1f} GiB are free: lower --seq_len, --heads or --batch"
        )


def _difference(ours: Any, dense: Any, mask: np.ndarray | None) -> float:
    """The largest difference of the outputs, where a query sees a key.

    Elsewhere ``jax.nn`` has the mean of all values, and we have 0.
    """
    apart = np.abs(np.asarray(ours, np.float64) - np.asarray(dense, np.float64))
    if mask is None:
        return float(apart.max())
    sees = np.moveaxis(np.asarray(mask.any(axis=-1)), 1, 2)[..., None]
    return float(np.max(np.where(sees, apart, 0)))


def _alternating(
    runs: dict[str, Any], inputs: tuple[Any, ...], rounds: int, name: str
) -> dict[str, list[float]]:
    """Milliseconds by side and round."""
    ms: dict[str, list[float]] = {side: [] for side in runs}
    with progress(f"timing {name}"):
        for _ in range(rounds):
            for side, run in runs.items():
                # The first call fills the caches, which the other side has emptied.
                jax.block_until_ready(run(*inputs))
                begin = time.perf_counter()
                jax.block_until_ready(run(*inputs))
                ms[side].append(1e3 * (time.perf_counter() - begin))
    return ms


def _figures(
    name: str, ms: dict[str, list[float]], temporary: dict[str, int]
) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(ms[OURS], ms[DENSE], strict=True)]
    return {
        "pass": name,
        "ms": {side: statistics.median(of) for side, of in ms.items()},
        "temporary_bytes": temporary,
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def _call_text(asked: flags.FlagValues, ids: dict[str, np.ndarray]) -> str:
    kv_heads = asked.kv_heads or asked.heads
    parts = [
        f"batch {asked.batch}",
        f"{asked.seq_len:,} queries",
        f"{kv_seq_len(asked):,} keys",
        f"{asked.heads} heads" + (f" on {kv_heads}" if kv_heads != asked.heads else ""),
        f"head_dim {asked.head_dim}",
        asked.dtype,
        *([f"{DOCUMENTS} documents"] if ids else []),
    ]
    return ", ".join(parts)


def _text(values: dict[str, Any]) -> str:
    place = values["machine"]
    facts = [
        ("machine", f"{place['cpu']}; {', '.join(place['devices'])}"),
        ("jax", values["jax"]),
        ("spec", values["spec"]),
        ("call", values["call"]),
        ("beside", f"jax.nn.dot_product_attention, {values['baseline']}"),
    ]
    if values["largest_difference"] is not None:
        facts.append(
            ("difference", f"{values['largest_difference']:.1e} at most in the output")
        )
    rows = tuple(_row(figures) for figures in values["passes"])
    table = ReportTable(
        f"medians of {values['rounds']} rounds in which the two take turns; MiB is "
        "temporary memory",
        ("", OURS, DENSE, "faster", "range", f"{OURS} MiB", f"{DENSE} MiB"),
        rows,
    )
    lines = (f"{name:<12}{value}" for name, value in facts)
    return "\n".join([*lines, "", str(table)])


def _row(figures: dict[str, Any]) -> tuple[str, ...]:
    low, high = figures["lowest_ratio"], figures["highest_ratio"]
    return (
        figures["pass"],
        *(f"{figures['ms'][side]:,.2f} ms" for side in (OURS, DENSE)),
        f"{figures['ratio']:.2f} x",
        f"{low:.2f} to {high:.2f}",
        *(f"{figures['temporary_bytes'][side] / 2**20:,.1f}" for side in (OURS, DENSE)),
    )
