"""The arithmetic of one chunk of a linear recurrence, on values, for all backends.

A state ``S [features, head_dim_v]`` is updated by one key after the other, ``S_t = a_t
S_(t-1) + k_t^T v_t``, and a query reads ``q_t S_t`` (Katharopoulos et al., Transformers
are RNNs, 2020, section 3.4; with a decay ``a_t``: Sun et al., Retentive Network, 2023,
section 2). The chunkwise form (Sun et al., 2023; Yang et al., Gated Linear Attention,
2024) takes three products for a chunk of tokens:

- ``scores @ v``: what its queries read from its own keys;
- ``reads @ S``: what they read from the state at its start;
- ``carry S + writes.T @ v``: the state at its end.

A ``Recurrence`` defines ``scores``, ``reads``, ``writes`` and ``carry``, so kernels do
not depend on the kind of decay. The gradient is not written by hand: backends apply
``jax.vjp`` to ``read`` and ``write`` inside their kernels. A gate per feature (Gated
Linear Attention, LightNet) would be a rule whose ``reads``, ``writes`` and ``carry``
scale features.

All values are f32 (f64 for f64 inputs). ``dot`` rounds the operands of a product to the
dtype of the inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from pallas_kernels.precision import wide

# dot(a, b, (axis of a, axis of b)), accumulated in f32.
Dot: TypeAlias = Callable[[Any, Any, tuple[int, int]], Any]

# A normaliser plus its epsilon counts as 0 if its absolute value is below the epsilon
# and below VANISHING. TINY is the bound for small epsilons: the square of its inverse,
# which a gradient contains, is still finite in f32.
VANISHING = 1e-10
TINY = 1e-15


class Pair(NamedTuple):
    """The same number per position of a chunk, as a column and as a row."""

    col: Any  # [chunk, 1]
    row: Any  # [1, chunk]


class Marks(NamedTuple):
    """The decays and resets at the positions of a chunk: a ``Pair`` each, or None.

    ``coarse + fine`` is the sum of the log-decays from the start of the chunk up to and
    including the position. ``coarse`` is exact, and ``fine`` is so small that the
    difference of two has a negligible rounding error (``marks.of_chunks``). ``run`` is
    the number of resets of the state in the chunk so far.
    """

    fine: Any = None
    coarse: Any = None
    run: Any = None


class ChunkKeys(NamedTuple):
    """The keys of a chunk."""

    k: Any  # [chunk, features]
    v: Any  # [chunk, head_dim_v]
    marks: Marks


class State(NamedTuple):
    """The state after some keys; ``z`` is None without a normaliser."""

    s: Any  # [features, head_dim_v]
    z: Any  # [1, features]: the sum of the keys


@dataclass(frozen=True)
class Recurrence:
    """A linear recurrence, as pure functions on the values of a chunk.

    - ``scores(dot, q, keys)``: the weights ``[chunk, chunk]`` of the chunk's own keys.
    - ``reads(q, marks)``: the queries that multiply the state at the chunk's start.
    - ``writes(k, marks)``: the keys that add to the state at the chunk's end.
    - ``carry(marks)``: the factor of the old state, a ``Pair`` of ``[features or 1,
      1]`` and ``[1, features or 1]``; None means 1.
    - ``eps``: if given, an output is divided by the sum of its weights plus ``eps``.
    """

    scores: Callable[[Dot, Any, ChunkKeys], Any]
    reads: Callable[[Any, Marks], Any]
    writes: Callable[[Any, Marks], Any]
    carry: Callable[[Marks], Pair | None]
    eps: float | None = None


def read(
    rule: Recurrence, dot: Dot, q: Any, keys: ChunkKeys, state: State
) -> tuple[Any, Any | None]:
    """The outputs of a chunk, ``[chunk, head_dim_v]``, and the normaliser.

    ``state`` is the state at the start of the chunk. The normaliser ``[chunk, 1]`` is
    the sum of weights plus ``eps``. Where it vanishes, it and the output are 0.
    """
    weights = rule.scores(dot, q, keys)
    reads, run = rule.reads(q, keys.marks), keys.marks.run

    def before_resets(x: Any) -> Any:
        # The state before a reset may be NaN, and 0 * nan is NaN.
        return x if run is None else jnp.where(run.col == 0, x, number(0.0, x))

    out = dot(weights, keys.v, (1, 0)) + before_resets(dot(reads, state.s, (1, 0)))
    if rule.eps is None:
        return out, None
    total = jnp.sum(weights, 1, keepdims=True)
    total += before_resets(jnp.sum(reads * state.z, 1, keepdims=True))
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


def number(value: int | float, like: Any) -> Any:
    """``value`` in the dtype of ``like``.

    With ``jax_enable_x64``, a Python float is a float64, which kernels do not have.
    """
    return like.dtype.type(value)


def write(rule: Recurrence, dot: Dot, keys: ChunkKeys, state: State) -> State:
    """The state at the end of a chunk, from the ``state`` at its start."""
    writes, carry = rule.writes(keys.k, keys.marks), rule.carry(keys.marks)
    v, run = keys.v, keys.marks.run
    if run is not None:
        v = jnp.where(run.col == _last(run.row), v, number(0.0, v))
    s, z = dot(writes, v, (0, 0)), None
    s += state.s if carry is None else carried(carry.col, state.s)
    if state.z is not None:
        z = jnp.sum(writes, 0, keepdims=True)
        z += state.z if carry is None else carried(carry.row, state.z)
    return State(s, z)


def carried(factor: Any, state: Any) -> Any:
    """``factor * state``; 0 where ``factor == 0``, also if the state is not finite."""
    return jnp.where(factor == 0, 0.0, factor * state)


# --- the scalar rule: no decay, or one factor per position, and resets ---


def _scores(dot: Dot, q: Any, keys: ChunkKeys) -> Any:
    marks, shape = keys.marks, (q.shape[0], keys.k.shape[0])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = column <= row
    if marks.run is not None:
        seen &= marks.run.col == marks.run.row
    s = dot(q, keys.k, (1, 1))
    if marks.fine is None or marks.coarse is None:
        return jnp.where(seen, s, number(0.0, s))
    past = marks.coarse.col - marks.coarse.row
    past += marks.fine.col - marks.fine.row
    # Both selections are needed: the gradient flows through the factor and the product.
    factor = jnp.exp(jnp.where(seen, past, number(0.0, past)))
    return jnp.where(seen, s * factor, number(0.0, s))


def _reads(q: Any, marks: Marks) -> Any:
    if marks.fine is not None and marks.coarse is not None:
        q = q * jnp.exp(marks.coarse.col + marks.fine.col)
    return q if marks.run is None else jnp.where(marks.run.col == 0, q, number(0.0, q))


def _writes(k: Any, marks: Marks) -> Any:
    if marks.fine is not None and marks.coarse is not None:
        left = _last(marks.coarse.row) - marks.coarse.col
        k = k * jnp.exp(left + (_last(marks.fine.row) - marks.fine.col))
    if marks.run is None:
        return k
    return jnp.where(marks.run.col == _last(marks.run.row), k, number(0.0, k))


def _carry(marks: Marks) -> Pair | None:
    factor = None
    if marks.fine is not None and marks.coarse is not None:
        factor = jnp.exp(_last(marks.coarse.row) + _last(marks.fine.row))
    if marks.run is not None:
        last = _last(marks.run.row)
        kept = jnp.ones_like(last) if factor is None else factor
        factor = jnp.where(last == 0, kept, number(0.0, kept))
    return None if factor is None else Pair(factor, factor)


def _last(row: Any) -> Any:
    """The last entry of ``[1, chunk]``, as ``[1, 1]``."""
    # Not every backend can index a value; all can sum.
    position = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)
    end = position == row.shape[1] - 1
    return jnp.sum(jnp.where(end, row, number(0.0, row)), axis=1, keepdims=True)


def scalar(eps: float | None) -> Recurrence:
    """The rule of linear attention with one decay per position for all features."""
    return Recurrence(_scores, _reads, _writes, _carry, eps)


# --- products ---


def plain_dot(dtype: Any) -> Dot:
    """The product of operands rounded to ``dtype``, with JAX's own derivative."""
    return partial(_product, dtype=jnp.dtype(dtype))


def kernel_dot(dtype: Any) -> Dot:
    """``plain_dot`` whose derivatives are such products too, without transposes."""
    return partial(_rounded, jnp.dtype(dtype))


def _product(a: Any, b: Any, contract: tuple[int, int], *, dtype: Any) -> Any:
    # 32-bit operands are multiplied in full precision; the default of chips is less.
    exact = dtype.itemsize >= 4
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=wide(dtype),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _rounded(dtype: Any, a: Any, b: Any, contract: tuple[int, int]) -> Any:
    return _product(a, b, contract, dtype=dtype)


def _rounded_fwd(dtype: Any, a: Any, b: Any, contract: tuple[int, int]) -> Any:
    return _product(a, b, contract, dtype=dtype), (a, b)


def _rounded_bwd(dtype: Any, contract: tuple[int, int], operands: Any, g: Any) -> Any:
    a, b = operands
    of_a, of_b = contract
    dot = plain_dot(dtype)
    da = dot(g, b, (1, 1 - of_b)) if of_a == 1 else dot(b, g, (1 - of_b, 1))
    db = dot(a, g, (1 - of_a, 0)) if of_b == 0 else dot(g, a, (0, 1 - of_a))
    return da, db


_rounded.defvjp(_rounded_fwd, _rounded_bwd)
