"""``induced``: the matrix of weights of a spec, for small sizes."""

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
    """Computes the weight of each key in the output of each query.

    The output of a spec is linear in the values, so attention with the identity matrix
    as values yields the weights. Rows sum to 1 for a softmax over any map, and for a
    Combiner that is full attention, but not for gates or means with empty parts.

    Args:
      q, k: as in ``sadsl.attention``.
      spec: a map, a term, or text.
      impl: the backend; "reference" is the dense definition.
      **options: options of ``sadsl.attention``, such as ``operands``.

    Raises:
      ValueError: the spec makes keys from values (``rowmajor`` with "proj").

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import sadsl as sa
      >>> spec = sa.causal() & sa.window(1)
      >>> weights = jax.jit(lambda x: sa.induced(x, x, spec))(jnp.zeros((1, 4, 1, 2)))
      >>> print(weights.reshape(4, 4))
      [[1. 0. 0. 0. ]
       [0.5 0.5 0. 0. ]
       [0. 0.5 0.5 0. ]
       [0. 0. 0.5 0.5]]
    """
    term = any_term(spec)
    if _reads_values(term):
        raise ValueError(
            f"{term!r} makes keys from values, so no matrix of weights is the same for "
            "all values: look at key='wsum' instead"
        )
    length, heads = k.shape[1:3]
    one = jnp.eye(length, dtype=k.dtype)[None, :, None]
    values = jnp.broadcast_to(one, (k.shape[0], length, heads, length))
    out = attention(q, k, values, term, impl=impl, **options)
    return jnp.swapaxes(cast(Array, out), 1, 2)


def _reads_values(term: Term) -> bool:
    """Whether the weights of a term depend on its values."""
    if isinstance(term, Summaries) and isinstance(term.partition, Rowmajor):
        return term.partition.key == "proj"
    return any(_reads_values(part) for part in term.parts if isinstance(part, Term))
