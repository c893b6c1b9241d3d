"""``dot_product_attention``: the signature of ``jax.nn``, with a spec.

A query that sees no key yields 0 and a residual of ``-inf``, where ``jax.nn`` gives the
mean of the values and a large negative number. A mask or bias is stored as it is
passed: one that is broadcast over heads or batch stays small, and padding, ``[batch, 1,
1, kv_seq]``, is a vector by which blocks are skipped.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.config import KernelConfig
from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, full, where, window
from sadsl.maps.symbols import operand
from sadsl.run.call import attention
from sadsl.run.dense_masks import PairSizes, bias_of, pairs_of
from sadsl.terms.base import Spec
from sadsl.terms.softmax import Softmax
from sadsl.text.specs import any_term

Queries: TypeAlias = Float[Array, "*batch q_seq num_q_heads head_dim"]
Keys: TypeAlias = Float[Array, "*batch kv_seq num_kv_heads head_dim"]
Values: TypeAlias = Float[Array, "*batch kv_seq num_kv_heads head_dim_v"]
Lengths: TypeAlias = Integer[Array, " batch"]
MASK, BIAS = "mask", "bias"
LENGTHS = "query_seq_lengths", "key_value_seq_lengths"


def dot_product_attention(
    query: Queries, key: Keys, value: Values, bias: Array | None = None,
    mask: Array | None = None, *, spec: Spec | str | None = None,
    scale: float | Array | None = None, is_causal: bool = False,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None, return_residual: bool = False,
    operands: Mapping[str, Any] | None = None, interpret: Any = False,
    config: KernelConfig | None = None,
) -> Any:  # fmt: skip
    """``jax.nn.dot_product_attention`` over the pairs of ``spec``, with its arguments.

    Every argument of ``jax.nn`` limits the pairs of ``spec`` further. One thing
    differs: a query that sees no key yields 0 and a residual of ``-inf``.

    Args:
      query, key, value: ``[batch, seq, heads, head_dim]``, or without the batch.
      bias: added to the scaled scores; broadcasts to ``[batch, heads, q_seq, kv_seq]``.
      mask: bools, true for the pairs that attend; broadcasts as ``bias``.
      spec: a map, a softmax or text; all pairs if None.
      scale: factor before the softmax, ``head_dim ** -0.5`` if None.
      is_causal: only keys up to the query, counted from the first of both.
      query_seq_lengths, key_value_seq_lengths: ``[batch]``; the rest is padding.
      local_window_size: keys before and after a query, or one number for both.
      implementation: the ``impl`` of ``sadsl.attention``; "cudnn" is refused.
      return_residual: also return the log-sum-exp, ``[batch, q_seq, heads]``, without
        a gradient.
      operands, interpret, config: as in ``sadsl.attention``.

    Raises:
      ValueError: shapes do not fit together.
      TypeError: the mask or the lengths have another dtype.
      NotImplementedError: the spec is not one softmax over a map.

    Example:
      >>> import jax.numpy as jnp, sadsl as sa
      >>> x, v = jnp.zeros((4, 1, 2)), jnp.arange(4.0).reshape(4, 1, 1)
      >>> sa.dot_product_attention(x, x, v, spec="window(1)")[:, 0, 0].tolist()
      [0.0, 0.5, 1.5, 2.5]
    """
    alone = query.ndim == 3
    if alone:
        query, key, value = query[None], key[None], value[None]
    batch, q_seq, heads, _ = query.shape
    sizes = PairSizes(batch, heads, q_seq, key.shape[1])
    term = _softmax(full() if spec is None else spec)
    term = replace(term, map=term.map & _positions(is_causal, local_window_size))
    lengths = query_seq_lengths, key_value_seq_lengths
    given = {**dict(zip(LENGTHS, lengths, strict=True)), MASK: mask, BIAS: bias}
    term, arrays = _limited(term, given, sizes)
    out, lse = attention(
        query, key, value, term, operands={**(operands or {}), **arrays},
        sm_scale=scale, return_lse=True, impl=implementation, interpret=interpret,
        config=config,
    )  # fmt: skip
    residual = jax.lax.stop_gradient(jnp.swapaxes(lse, 1, 2).astype(key.dtype))
    if alone:
        out, residual = out[0], residual[0]
    return (out, residual) if return_residual else out


def _limited(
    term: Softmax, given: Mapping[str, Any], sizes: PairSizes
) -> tuple[Softmax, dict[str, Array]]:
    """The spec with the arrays of a call that are not None, and what it then reads.

    Raises:
      ValueError: an array does not fit the sizes.
      TypeError: it has another dtype.
    """
    found: dict[str, Array] = {}
    pairs, added = term.map, term.bias
    for name in given:
        if term.reads(name):
            raise ValueError(
                f"spec={term!r} reads an operand {name!r}, the name of an argument: "
                "give the operand another name"
            )
    for name in LENGTHS:
        if given[name] is not None:
            found[name] = _lengths(name, given[name], sizes.batch)
            pairs = pairs & _within(name)
    if given[MASK] is not None:
        mask = jnp.asarray(given[MASK])
        if mask.dtype != bool:
            raise TypeError(
                f"mask has dtype {mask.dtype}: it must be bool; numbers are a bias"
            )
        extra, found[MASK] = pairs_of(MASK, mask, sizes)
        pairs = pairs & extra
    if given[BIAS] is not None:
        more, found[BIAS] = bias_of(BIAS, jnp.asarray(given[BIAS]), sizes)
        added = more if added is None else added + more
    return replace(term, map=pairs, bias=added), found


def _softmax(spec: Spec | str) -> Softmax:
    term = any_term(spec)
    if isinstance(term, Softmax):
        return term
    raise NotImplementedError(
        f"spec={term!r} is not one softmax over a map, which the other arguments "
        "limit: call sadsl.attention"
    )


def _positions(
    is_causal: bool, local_window_size: int | tuple[int, int] | None
) -> IndexMap:
    """The pairs that positions alone allow."""
    found: IndexMap = causal() if is_causal else full()
    if local_window_size is None:
        return found
    size = local_window_size
    before, after = (size, size) if isinstance(size, int) else size
    return found & window(before, after)


def _within(name: str) -> IndexMap:
    """The pairs that are not padding."""
    if name == LENGTHS[0]:
        return where(lambda q, k: q < operand(name))
    return where(lambda q, k: k < operand(name))


def _lengths(name: str, lengths: Any, batch: int) -> Array:
    """The lengths, checked.

    Raises:
      ValueError: there is not one for each batch entry.
      TypeError: they are not integers.
    """
    found = jnp.asarray(lengths)
    if found.shape != (batch,):
        raise ValueError(
            f"{name} has shape {found.shape}: it must have one length for each of "
            f"the {batch} batch entries"
        )
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {found.dtype}: it must hold integers")
    return found
