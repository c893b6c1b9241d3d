"""The matrix of weights that a spec amounts to, for small sizes."""

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from sadsl.run.call import attention
from sadsl.terms.base import Spec, Term
from sadsl.terms.grid_regions import Rowmajor
from sadsl.terms.summaries import Summaries
from sadsl.text.specs import any_term


def induced(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    spec: Spec | str,
    *,
    impl: str = "reference",
    **options: Any,
) -> Float[Array, "batch num_q_heads q_seq kv_seq"]:
    """The weight of each key in the output of each query.

    Found by attention to the identity instead of values: the output of every spec is
    linear in the values. A softmax over any map, and a Combiner that is full attention,
    have rows that sum to 1; gates, or a mean over parts that may be empty, have not.

    Args:
      q, k: as in ``sadsl.attention``.
      spec: a map, a term, or text.
      impl: the backend; the dense definition unless another is named.
      **options: those of ``sadsl.attention``, such as ``operands``.

    Raises:
      ValueError: keys of the spec are made from values (``rowmajor`` with "proj").
    """
    term = any_term(spec)
    if _reads_values(term):
        raise ValueError(
            f"{term!r} makes keys from values, so that no matrix of weights is the "
            "same for all values: look at key='wsum' instead"
        )
    length, heads = k.shape[1:3]
    one = jnp.eye(length, dtype=k.dtype)[None, :, None]
    values = jnp.broadcast_to(one, (k.shape[0], length, heads, length))
    out = attention(q, k, values, term, impl=impl, **options)
    return jnp.swapaxes(cast(Array, out), 1, 2)


def _reads_values(term: Term) -> bool:
    if isinstance(term, Summaries) and isinstance(term.partition, Rowmajor):
        return term.partition.key == "proj"
    return any(_reads_values(part) for part in term.parts if isinstance(part, Term))
