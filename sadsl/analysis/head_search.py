"""Which pattern suits which head: an offline search on samples of q, k and v.

Jiang et al., MInference 1.0, 2024, section 3.2 and algorithm 1; Li et al., MMInference,
2025, section 4. Everything is read off calls of ``attention``, so nothing of the size
of queries times keys is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowering import ir
from sadsl.maps.base import IndexMap, PerHead, per_head
from sadsl.maps.named import causal, keys
from sadsl.run.call import attention, select
from sadsl.selections.base import selections_of

# How far the output is from that of dense attention, how much attention is kept, or how
# many numbers of the output differ.
Measure = Literal["output", "recall", "mismatch"]
MISMATCH = 5e-3


@dataclass(frozen=True)
class Sample:
    """What candidates are tried on, as ``attention`` takes it."""

    q: Float[Array, "batch length num_q_heads head_dim"]
    k: Float[Array, "batch length num_kv_heads head_dim"]
    v: Float[Array, "batch length num_kv_heads head_dim_v"]
    operands: Mapping[str, Any] | None = None
    sm_scale: float | None = None

    @property
    def num_heads(self) -> int:
        """The heads that are searched for."""
        return self.q.shape[2]

    def read_by(self, spec: IndexMap) -> dict[str, Any]:
        """The operands that a spec reads."""
        names = set(ir.operand_names(spec.node))
        names |= {name for s in selections_of(spec) for name in s.operands}
        return {n: x for n, x in (self.operands or {}).items() if n in names}

    def run(self, spec: IndexMap) -> tuple[np.ndarray, np.ndarray]:
        """Output and lse, float64."""
        return self._attend(self.q, spec)

    def num_pairs(self, spec: IndexMap) -> np.ndarray:
        """Attended pairs of every head, summed over the batch.

        The logits of zero queries are zero: ``lse`` is the logarithm of a count.
        """
        _, lse = self._attend(jnp.zeros_like(self.q), spec)
        return np.rint(np.exp(lse)).sum(axis=(0, 2)).astype(np.int64)

    def _attend(self, q: Array, spec: IndexMap) -> tuple[np.ndarray, np.ndarray]:
        """Attention of ``q`` over what ``self.q`` selects."""
        given = self.read_by(spec)
        made = _parts(spec, self.q, self.k, given, self.sm_scale)
        out, lse = attention(
            q, self.k, self.v, spec,
            operands={**given, **made}, sm_scale=self.sm_scale, return_lse=True,
        )  # fmt: skip
        return np.asarray(out, np.float64), np.asarray(lse, np.float64)


@partial(jax.jit, static_argnums=(0, 4))
def _parts(
    spec: IndexMap, q: Array, k: Array, given: dict, sm_scale: float | None
) -> dict[str, Array]:
    return select(spec, q, k, operands=given, sm_scale=sm_scale)


@dataclass(frozen=True)
class Found:
    """What a search found: a map for every head, and how all candidates did."""

    spec: PerHead
    chosen: tuple[int, ...]  # of each head, the number of its candidate
    measured: np.ndarray  # [candidates, heads]


def search_heads(
    sample: Sample, candidates: Sequence[IndexMap], *, by: Measure = "output"
) -> Found:
    """Gives every head the candidate that comes nearest to dense causal attention.

    ``by`` says what is near: "output", the least norm of the difference of the outputs
    (the paper); "recall", the greatest mean share of attention on the pairs that are
    kept (the first code); "mismatch", the fewest numbers of the output that are off by
    more than 5e-3 (the later code). The earlier candidate wins a tie. Candidates should
    take like work: see ``fit_size``. A head counts alone, in every batch entry.

    Raises:
      ValueError: there is no candidate, or the measure is not one of these.
    """
    if by not in ("output", "recall", "mismatch"):
        raise ValueError(f"by={by!r} must be 'output', 'recall' or 'mismatch'")
    _check(candidates)
    dense = sample.run(causal())
    measured = np.stack([_measure(sample.run(c), dense, by) for c in candidates])
    better = measured.argmax if by == "recall" else measured.argmin
    return _found(candidates, better(axis=0), measured)


def _measure(found: tuple, dense: tuple, by: Measure) -> np.ndarray:
    """One number a head."""
    out, lse = found
    if by == "recall":
        return np.exp(lse - dense[1]).mean(axis=(0, 2))
    difference = np.abs(out - dense[0])
    if by == "mismatch":
        return (difference > MISMATCH).sum(axis=(0, 1, 3)).astype(float)
    return np.sqrt(np.square(difference).sum(axis=(0, 1, 3)))


def search_in_order(
    sample: Sample,
    candidates: Sequence[IndexMap],
    *,
    span: tuple[int, int],
    gain: float = 0.01,
) -> Found:
    """Gives every head a candidate that keeps the attention within a span.

    Li et al., MMInference, 2025, as its code does: the recall is the share that is kept
    of what the queries of ``span`` (start, stop: the vision tokens) give to its keys. A
    candidate replaces the one before it only where it keeps more by over ``gain``: the
    order matters. The code takes samples of up to 25,000 tokens.

    Raises:
      ValueError: there is no candidate, or the span is not one of the sample.
    """
    _check(candidates)
    start, stop = span
    if not 0 <= start < stop <= sample.q.shape[1]:
        raise ValueError(
            f"span={span} must be (start, stop) with 0 <= start < stop <= "
            f"{sample.q.shape[1]}, the length of the sample"
        )
    inside = keys(start, stop)
    whole = sample.run(causal())[1]

    def mass(spec: IndexMap) -> np.ndarray:
        lse = sample.run(spec & inside)[1]
        return np.exp(lse - whole)[:, :, start:stop].sum(axis=(0, 2))

    everything = mass(causal())
    measured = np.stack([mass(c) / everything for c in candidates])
    chosen = np.zeros(sample.num_heads, int)
    best = measured[0].copy()
    for number, recall in enumerate(measured[1:], start=1):
        better = recall > best + gain
        chosen, best = np.where(better, number, chosen), np.where(better, recall, best)
    return _found(candidates, chosen, measured)


def fit_size(
    make: Callable[[int], IndexMap],
    sample: Sample,
    num_pairs: float,
    *,
    least: int = 1,
    most: int | None = None,
) -> int:
    """The greatest size whose map has ``num_pairs`` pairs a head or fewer, on average.

    So candidates are brought to equal work (MInference, algorithm 1: that of an A-shape
    of 1k global and 4k local keys); a pair takes ``4 * head_dim`` operations. More
    pairs must come with a greater size. ``most`` is the length if None; ``least``,
    should that have too many already. Each size that is tried is compiled.
    """
    most = sample.k.shape[1] if most is None else most
    while least < most:
        middle = (least + most + 1) // 2
        pairs = sample.num_pairs(make(middle)).mean() / sample.q.shape[0]
        least, most = (middle, most) if pairs <= num_pairs else (least, middle - 1)
    return least


def _check(candidates: Sequence[IndexMap]) -> None:
    if not candidates:
        raise ValueError("candidates=(): give at least one map")


def _found(
    candidates: Sequence[IndexMap], chosen: np.ndarray, measured: np.ndarray
) -> Found:
    numbers = tuple(int(c) for c in chosen)
    return Found(per_head(*(candidates[c] for c in numbers)), numbers, measured)
