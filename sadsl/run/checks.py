"""Checks the arrays and the options of a call, once, before anything runs."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowering.problem import Problem
from pallas_kernels.precision import wide
from sadsl.maps.integers import holds_int32
from sadsl.terms.base import Term

Shape: TypeAlias = tuple[int, ...]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def positive(sizes: Mapping[str, Any]) -> None:
    """Refuses sizes that are no Python integers of at least 1.

    Raises:
      ValueError: one is not.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def problem(q: Any, k: Any, v: Any, q_offset: int, term: Term | None = None) -> Problem:
    """Checks q, k and v and returns the sizes of the call.

    Args:
      q, k, v: arrays or ShapeDtypeStructs, ``[batch, seq, heads, head_dim]``.
      q_offset: the position of the first query.
      term: what runs; it may allow more heads of v, or another head_dim of k.

    Raises:
      ValueError: ranks, lengths, heads or dtypes do not fit together.
      TypeError: the offset is not an integer.
    """
    _check_ranks_and_dtypes(q, k, v)
    _check_sizes(q.shape, k.shape, v.shape, Term() if term is None else term)
    if isinstance(q_offset, bool) or not isinstance(q_offset, int | np.integer):
        raise TypeError(
            f"q_offset={q_offset!r} must be an integer: the position of the first query"
        )
    if q_offset < 0:
        raise ValueError(f"q_offset={q_offset} must be at least 0")
    return Problem(q.shape[1], k.shape[1], q.shape[2], int(q_offset))


def _check_ranks_and_dtypes(q: Any, k: Any, v: Any) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if len(x.shape) != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: it must have the four axes "
                "[batch, seq, heads, head_dim]"
            )
        if not all(isinstance(size, int) for size in x.shape[1:]):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: only the batch may be symbolic, "
                "since plans are made for known lengths, heads and sizes: export one "
                "program for each length"
            )
        if np.dtype(x.dtype).name not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}: must be one of {DTYPES}")
        if x.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype}, q has {q.dtype}: cast them to one dtype"
            )


def _check_sizes(q: Shape, k: Shape, v: Shape, term: Term) -> None:
    batch, _, num_q_heads, head_dim = q
    _, kv_seq_len, num_kv_heads, _ = k
    wanted = batch, kv_seq_len, num_kv_heads
    for name, shape in {"k": k, "v": v}.items():
        heads = shape[2] if term.more_values else num_kv_heads
        if shape[:2] != wanted[:2] or heads != shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(shape)}: batch, length and heads must be "
                f"{wanted}, the batch of q and the rest as in k"
            )
    if k[3] != head_dim and not term.own_head_dim:
        raise ValueError(f"k has head_dim {k[3]}, q has {head_dim}: must be equal")
    for name, shape in {"q": q, "k": k, "v": v}.items():
        if 0 in shape:
            raise ValueError(f"{name} has shape {tuple(shape)}: no axis may be empty")
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, k and v have {num_kv_heads}: the heads of q "
            "must be a multiple of those of k and v (grouped-query attention)"
        )
    if v[2] % num_kv_heads or (num_q_heads % v[2] and v[2] % num_q_heads):
        raise ValueError(
            f"v has {v[2]} heads, q has {num_q_heads}, k has {num_kv_heads}: those of "
            "v must be a multiple of those of k, and divide those of q or be a "
            "multiple of them"
        )


def scale(sm_scale: Any, head_dim: int) -> Any:
    """The scale of a call; ``head_dim ** -0.5`` if ``sm_scale`` is None.

    A Python float, or a traced scalar of float32 (float64 for float64).

    Raises:
      ValueError: it is not one number.
    """
    if sm_scale is None:
        return float(head_dim**-0.5)
    if np.ndim(sm_scale):
        raise ValueError(
            f"sm_scale has shape {np.shape(sm_scale)}: it must be one number; where "
            "the factors differ, multiply q by them"
        )
    if isinstance(sm_scale, jax.core.Tracer):
        return sm_scale.astype(wide(sm_scale.dtype))
    return float(sm_scale)


def precision(dtype: Any, impl: str) -> None:
    """Refuses float64 on the backends whose kernels have no float64.

    Raises:
      NotImplementedError: this backend has no float64.
    """
    if dtype == jnp.float64 and impl not in ("reference", "xla"):
        raise NotImplementedError(
            f"impl={impl!r} takes float32, bfloat16 or float16, not float64: cast, or "
            "use impl='xla' or impl='reference'"
        )


def dropout(rate: Any, key: Any) -> float:
    """Checks the dropout rate of a call and returns it as a float; 0 drops nothing.

    Raises:
      ValueError: the rate is outside [0, 1), or there is a rate without a key.
      TypeError: the rate is traced.
    """
    if isinstance(rate, jax.core.Tracer):
        raise TypeError(
            f"dropout_rate={rate!r} is traced: it must be a Python number, since it is "
            "a constant of the kernels; make it a static argument of your jit"
        )
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate} must be at least 0 and below 1")
    if rate and key is None:
        raise ValueError(
            f"dropout_rate={rate} without dropout_key: pass a key of jax.random, or "
            "dropout_rate=0 to drop nothing"
        )
    return float(rate)


def segment_ids(q_ids: Any, kv_ids: Any) -> tuple[Any, Any]:
    """The segment ids, replaced by their ranks if int32 does not hold all of them.

    Ranks keep which ids are equal and which are smaller. The values of traced ids are
    not known, so they stay; ``integers`` later refuses dtypes that int32 cannot hold.
    """
    both = [x if isinstance(x, jax.Array) else np.asarray(x) for x in (q_ids, kv_ids)]
    if all(_is_small(x) for x in both):
        return q_ids, kv_ids
    if any(isinstance(x, jax.core.Tracer) for x in both):
        return q_ids, kv_ids
    found = [np.unique(np.asarray(x), return_inverse=True) for x in both]
    # As Python integers, since no dtype holds both int64 and uint64.
    values = sorted({value for unique, _ in found for value in unique.tolist()})
    rank = {value: i for i, value in enumerate(values)}
    q_rank, kv_rank = (
        np.array([rank[v] for v in unique.tolist()], np.int32)[of].reshape(x.shape)
        for (unique, of), x in zip(found, both, strict=True)
    )
    return q_rank, kv_rank


def _is_small(ids: Any) -> bool:
    """Whether int32 holds the ids, as far as their values are known.

    True for arrays that are not integers: another check refuses them.
    """
    if not np.issubdtype(ids.dtype, np.integer) or holds_int32(ids.dtype):
        return True
    if isinstance(ids, jax.core.Tracer):
        return False
    found, most = np.asarray(ids), np.iinfo(np.int32)
    return found.min(initial=0) >= most.min and found.max(initial=0) <= most.max
