"""The arithmetic of one chunk of a linear recurrence, on values, for all backends.

A state ``S [features, head_dim_v]`` decays, loses what a key's erase vector reads, and
gains the key's value. A query reads it::

    S' = D_t S_(t-1)                    D_t: 1, a number, or a diagonal
    u_t = v_t - S'^T e_t                without an erase vector: u_t = v_t
    S_t = S' + k_t u_t^T
    o_t = S_t^T q_t

(Katharopoulos et al., Transformers are RNNs, 2020, section 3.4; with decay: Sun et al.,
Retentive Network, 2023; Yang et al., Gated Linear Attention, 2024; with ``e = beta k``
and ``v`` scaled by beta: Yang et al., Gated Delta Networks, 2024, section 3.) For a
chunk with state ``S`` at its start, and ``pairs`` and the decay factors of ``gates``::

    U = (I + A)^-1 (V - (e * reads) S)      A = pairs(e, k) below the diagonal
    O = (q * reads) S + pairs(q, k) U
    S = whole S + (k * writes)^T U

``O`` may be divided by the same with 1 for ``U``, plus ``eps``. The gradient is not
written by hand: backends apply ``jax.vjp`` to these functions inside their kernels.

All values are f32 (f64 for f64 inputs). ``ops.dot`` rounds the operands of a product to
the dtype of the inputs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.linear.gates import Decay, decay_of, times
from pallas_kernels.linear.marks import Marks, Pair
from pallas_kernels.linear.products import Ops, column_index, number, row_index

# A normaliser plus its epsilon counts as 0 if its absolute value is below the epsilon
# and below VANISHING. TINY is the bound for small epsilons: the square of its inverse,
# which a gradient contains, is still finite in f32.
VANISHING = 1e-10
TINY = 1e-15


@dataclass(frozen=True)
class Recurrence:
    """The static part of a recurrence.

    Attributes:
      eps: if given, an output is divided by the sum of its weights plus ``eps``.
      read_before: a query reads the state before its own decay and key.
      erase_before: so does an erase vector: ``u_t = v_t - S_(t-1)^T e_t``.
    """

    eps: float | None = None
    read_before: bool = False
    erase_before: bool = False


class ChunkKeys(NamedTuple):
    """The keys of a chunk."""

    k: Any  # [chunk, features]
    v: Any  # [chunk, head_dim_v]
    erase: Any  # [chunk, features], or None
    gate: Any  # log-decays by channel, [chunk, features], or None
    marks: Marks


class State(NamedTuple):
    """The state after some keys; ``z`` is None without a normaliser."""

    s: Any  # [features, head_dim_v]
    z: Any  # [1, features]: the sum of the keys


class Written(NamedTuple):
    """What the keys of a chunk write: the values ``U``, under a decay."""

    values: Any  # [chunk, head_dim_v]
    decay: Decay


def of_chunk(
    rule: Recurrence, ops: Ops, q: Any, keys: ChunkKeys, state: State
) -> tuple[Any, Any | None, State]:
    """The outputs and normalisers of a chunk, and the state at its end.

    ``q`` may be ``[members * chunk, features]``: query heads that share the keys.
    """
    written = write(rule, ops, keys, state)
    out, total = read(rule, ops, q, keys, written, state)
    return out, total, advance(ops, keys, written, state)


def write(rule: Recurrence, ops: Ops, keys: ChunkKeys, state: State) -> Written:
    """The values that the keys of a chunk write."""
    decay = decay_of(keys.gate, keys.marks, ops)
    if keys.erase is None:
        return Written(keys.v, decay)
    lower = erased_pairs(rule, keys, decay)
    reads = erase_reads(rule, keys, decay)
    right = keys.v - _before_resets(ops.dot(reads, state.s, (1, 0)), keys.marks)
    return Written(ops.solve(lower, right), decay)


def erased_pairs(rule: Recurrence, keys: ChunkKeys, decay: Decay) -> Any:
    """What each erase vector reads of each earlier key: strictly lower."""
    scores = decay.pairs(keys.erase, keys.k, rule.erase_before)
    below = column_index(scores.shape) < row_index(scores.shape)
    if keys.marks.run is not None:
        below &= keys.marks.run.col == keys.marks.run.row
    return jnp.where(below, scores, number(0.0, scores))


def erase_reads(rule: Recurrence, keys: ChunkKeys, decay: Decay) -> Any:
    """The erase vectors that multiply the state at the chunk's start."""
    factor = decay.reads_before if rule.erase_before else decay.reads
    return _before_resets(times(keys.erase, factor), keys.marks)


def read(
    rule: Recurrence,
    ops: Ops,
    q: Any,
    keys: ChunkKeys,
    written: Written,
    state: State,
) -> tuple[Any, Any | None]:
    """The outputs of a chunk, and the normaliser ``[rows, 1]`` or None.

    ``state`` is the state at the start of the chunk. The normaliser is the sum of the
    weights plus ``eps``. Where it vanishes, it and the output are 0.
    """
    decay, marks = written.decay, keys.marks
    weights = decay.pairs(q, keys.k, rule.read_before)
    if marks.run is not None:
        same = _rows(marks.run.col, q.shape[0]) == marks.run.row
        weights = jnp.where(same, weights, number(0.0, weights))
    reads = times(q, decay.reads_before if rule.read_before else decay.reads)
    reads = _before_resets(reads, marks)
    # The state before a reset may be NaN, and 0 * nan is NaN.
    old = _before_resets(ops.dot(reads, state.s, (1, 0)), marks)
    out = ops.dot(weights, written.values, (1, 0)) + old
    if rule.eps is None:
        return out, None
    total = jnp.sum(weights, 1, keepdims=True)
    total += _before_resets(jnp.sum(reads * state.z, 1, keepdims=True), marks)
    return normalised(out, total, rule.eps)


def normalised(out: Any, total: Any, eps: float) -> tuple[Any, Any]:
    """``out / (total + eps)`` and ``total + eps``; both are 0 where that vanishes.

    It vanishes if ``total == 0`` (no key was seen), or if ``|total + eps|`` is below
    ``max(min(eps, 1e-10), 1e-15)`` (the weights cancel). NaN stays NaN.
    """
    least = max(min(eps, VANISHING), TINY)
    gone = (total == 0) | (jnp.abs(total + eps) < least)
    safe = jnp.where(gone, 1.0, total + eps)
    return jnp.where(gone, 0.0, out / safe), jnp.where(gone, 0.0, safe)


def advance(ops: Ops, keys: ChunkKeys, written: Written, state: State) -> State:
    """The state at the end of a chunk, from the ``state`` at its start."""
    writes, whole = written_keys(keys, written.decay)
    col, row = (None, None) if whole is None else whole
    values = written.values
    if keys.marks.run is not None:
        # What an earlier document wrote may be NaN, and 0 * nan is NaN.
        values = jnp.where(in_last_run(keys.marks.run), values, number(0.0, values))
    s, z = ops.dot(writes, values, (0, 0)) + carried(col, state.s), None
    if state.z is not None:
        z = jnp.sum(writes, 0, keepdims=True) + carried(row, state.z)
    return State(s, z)


def written_keys(keys: ChunkKeys, decay: Decay) -> tuple[Any, Pair | None]:
    """The keys that add to the state at the chunk's end, and the old state's factor."""
    writes, whole, run = times(keys.k, decay.writes), decay.whole, keys.marks.run
    if run is None:
        return writes, whole
    # Counts of resets grow, so the greatest is that of the chunk's end.
    last = jnp.max(run.row, axis=1, keepdims=True)
    one = jnp.ones_like(last)
    col, row = Pair(one, one) if whole is None else whole
    kept = Pair(*(jnp.where(last == 0, x, number(0.0, x)) for x in (col, row)))
    return jnp.where(in_last_run(run), writes, number(0.0, writes)), kept


def in_last_run(run: Pair) -> Any:
    """Which positions no reset of their chunk follows, bool ``[chunk, 1]``."""
    return run.col == jnp.max(run.row, axis=1, keepdims=True)


def carried(factor: Any, state: Any) -> Any:
    """``factor * state``; 0 where ``factor == 0``, also if the state is not finite."""
    if factor is None:
        return state
    return jnp.where(factor == 0, number(0.0, state), factor * state)


def _before_resets(x: Any, marks: Marks) -> Any:
    """``x`` with 0 in the rows that come after a reset of the state."""
    if marks.run is None:
        return x
    return jnp.where(_rows(marks.run.col, x.shape[0]) == 0, x, number(0.0, x))


def _rows(col: Any, rows: int) -> Any:
    """``[chunk, 1]`` once for each member: ``[rows, 1]``."""
    chunk = col.shape[0]
    if rows == chunk:
        return col
    return jnp.broadcast_to(col[None], (rows // chunk, chunk, 1)).reshape(rows, 1)
