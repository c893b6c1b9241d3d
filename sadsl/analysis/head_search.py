"""Searches offline which pattern suits which head, on samples of q, k and v.

Jiang et al., MInference 1.0, 2024, section 3.2 and algorithm 1; Li et al., MMInference,
2025, section 4. All measures come from calls of ``attention``, so no array of the size
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

# The distance of the output from that of dense attention; the share of attention that
# is kept; or how many numbers of the output differ by more than MISMATCH.
Measure = Literal["output", "recall", "mismatch"]
MISMATCH = 5e-3


@dataclass(frozen=True)
class Sample:
    """The inputs on which candidates are tried, as ``attention`` takes them."""

    q: Float[Array, "batch length num_q_heads head_dim"]
    k: Float[Array, "batch length num_kv_heads head_dim"]
    v: Float[Array, "batch length num_kv_heads head_dim_v"]
    operands: Mapping[str, Any] | None = None
    sm_scale: float | None = None

    @property
    def num_heads(self) -> int:
        """The number of query heads."""
        return self.q.shape[2]

    def read_by(self, spec: IndexMap) -> dict[str, Any]:
        """The operands of the sample that a spec reads."""
        names = set(ir.operand_names(spec.node))
        names |= {name for s in selections_of(spec) for name in s.operands}
        return {n: x for n, x in (self.operands or {}).items() if n in names}

    def run(self, spec: IndexMap) -> tuple[np.ndarray, np.ndarray]:
        """Output ``[batch, q, heads, dim_v]``, lse ``[batch, heads, q]``; float64."""
        return self._attend(self.q, spec)

    def num_pairs(self, spec: IndexMap) -> np.ndarray:
        """The attended pairs of every head, summed over the batch.

        Queries of zeros have scores of 0, so the ``lse`` is the logarithm of a count.
        """
        _, lse = self._attend(jnp.zeros_like(self.q), spec)
        return np.rint(np.exp(lse)).sum(axis=(0, 2)).astype(np.int64)

    def _attend(self, q: Array, spec: IndexMap) -> tuple[np.ndarray, np.ndarray]:
        """Attention of ``q`` over the keys that selections choose for ``self.q``."""
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
    """The result of a search: a map for every head, and all measures.

    Attributes:
      spec: the map of all heads.
      chosen: the index of the candidate of each head.
      measured: the measure of every candidate on every head, ``[candidates, heads]``.
    """

    spec: PerHead
    chosen: tuple[int, ...]
    measured: np.ndarray


def search_heads(
    sample: Sample, candidates: Sequence[IndexMap], *, by: Measure = "output"
) -> Found:
    """Gives every head the candidate that is nearest to dense causal attention.

    Jiang et al., MInference 1.0, 2024, algorithm 1. The earlier candidate wins a tie.
    Candidates should cost about the same: see ``fit_size``. Each head is judged alone,
    over all batch entries.

    Args:
      sample: the inputs to try candidates on.
      candidates: index maps.
      by: the measure. "output": the least norm of the difference of the outputs (the
        paper). "recall": the greatest mean share of attention on the pairs of the map
        (its first code). "mismatch": the fewest numbers of the output that differ by
        more than 5e-3 (its later code).

    Raises:
      ValueError: there is no candidate, or the measure is unknown.
    """
    if by not in ("output", "recall", "mismatch"):
        raise ValueError(f"by={by!r} must be 'output', 'recall' or 'mismatch'")
    _check(candidates)
    dense = sample.run(causal())
    measured = np.stack([_measure(sample.run(c), dense, by) for c in candidates])
    better = measured.argmax if by == "recall" else measured.argmin
    return _found(candidates, better(axis=0), measured)


def _measure(found: tuple, dense: tuple, by: Measure) -> np.ndarray:
    """The measure of every head, ``[heads]``, from pairs (output, lse)."""
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
    """Gives every head a candidate that keeps the attention within a span of tokens.

    Li et al., MMInference, 2025, as in its code. The recall of a candidate is the share
    that it keeps of the attention from the queries to the keys of the span. A candidate
    replaces an earlier one only if its recall is greater by more than ``gain``, so the
    order matters. The code takes samples of up to 25,000 tokens.

    Args:
      sample: the inputs to try candidates on.
      candidates: index maps, in order.
      span: start and stop of the span, such as the vision tokens.
      gain: the least advantage of a later candidate.

    Raises:
      ValueError: there is no candidate, or the span is not within the sample.
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
    """Finds the greatest size whose map has at most ``num_pairs`` pairs for each head.

    This gives all candidates equal work (MInference, algorithm 1: the work of an
    A-shape with 1k global and 4k local keys). A pair costs ``4 * head_dim`` operations.
    Each size that is tried is compiled.

    Args:
      make: the map of a size; a greater size must not have fewer pairs.
      sample: the inputs on which pairs are counted.
      num_pairs: the most pairs of a head, as a mean over heads and batch entries.
      least: the smallest size, returned even if it has more pairs.
      most: the greatest size; the number of keys if None.
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
