"""DeltaLLM, a reconstruction: far keys change only where they moved enough.

Qi et al., DeltaLLM: a training-free framework exploiting temporal sparsity for
efficient edge LLM inference, 2025. The abstract names the parts: a delta matrix of keys
over time, full attention in a local window and the approximation outside of it. How the
deltas are made is reconstructed here, not taken from the paper.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.precision import wide
from sadsl.maps.base import at_least
from sadsl.maps.named import causal
from sadsl.maps.named import window as near
from sadsl.run import merging
from sadsl.run.call import attention
from sadsl.run.types import Outcome


class ReferenceKeys(NamedTuple):
    """The keys that far queries see, and which of their elements changed.

    Attributes:
      keys: ``[batch, seq, heads, head_dim]``, no element further than theta from its
        key.
      updated: whether an element differs from that of the position before, of the same
        shape. A product of a query and the delta of a key is skipped where it is False.
    """

    keys: Float[Array, "batch seq heads head_dim"]
    updated: Bool[Array, "batch seq heads head_dim"]


def reference_keys(
    k: Float[Array, "batch seq heads head_dim"], theta: float | Array
) -> ReferenceKeys:
    """Follows keys over time, and changes an element only if it moved by over theta.

    The reference starts as the first key. At each position, the elements that differ
    from the reference by more than ``theta`` become those of the key. So a key is
    approximated by earlier ones only.

    A reconstruction after Qi et al., DeltaLLM, 2025. Which elements change has no
    gradient; the gradient of an element goes to the key that it was taken from.

    Args:
      k: keys, in the order of time.
      theta: how far an element may move before it is updated, in the units of k; 0
        returns the keys as they are.

    Raises:
      ValueError: theta is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sadsl import catalog
      >>> k = jnp.array([1.0, 1.2, 1.4, 3.0, 2.9]).reshape(1, 5, 1, 1)
      >>> follow = jax.jit(catalog.reference_keys, static_argnums=1)
      >>> found = follow(k, 0.3)
      >>> [round(x, 1) for x in found.keys.ravel().tolist()]
      [1.0, 1.0, 1.4, 3.0, 3.0]
      >>> found.updated.ravel().tolist()
      [True, False, True, True, False]
    """
    _check_theta(theta)
    bound = jnp.asarray(theta, wide(k.dtype))

    def follow(reference: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
        moved = jnp.abs(key.astype(bound.dtype) - reference.astype(bound.dtype)) > bound
        reference = jnp.where(moved, key, reference)
        return reference, (reference, moved)

    by_time = jnp.moveaxis(k, 1, 0)
    _, found = jax.lax.scan(follow, by_time[0], by_time[1:])
    keys, moved = (jnp.moveaxis(x, 0, 1) for x in found)
    first = jnp.ones_like(k[:, :1], bool)
    return ReferenceKeys(
        jnp.concatenate([k[:, :1], keys], axis=1),
        jnp.concatenate([first, moved], axis=1),
    )


def delta_llm(
    q: Float[Array, "batch q_seq num_q_heads head_dim"],
    k: Float[Array, "batch kv_seq num_kv_heads head_dim"],
    v: Float[Array, "batch kv_seq num_kv_heads head_dim_v"],
    theta: float | Array = 0.1,
    window: int = 128,
    *,
    return_lse: bool = False,
    **options: Any,
) -> (
    Float[Array, "batch q_seq num_q_heads head_dim_v"]
    | tuple[
        Float[Array, "batch q_seq num_q_heads head_dim_v"],
        Float32[Array, "batch num_q_heads q_seq"],
    ]
):
    """Causal attention that is exact nearby, and reads ``reference_keys`` beyond.

    One softmax covers the exact scores of the last ``window`` keys and the own, and the
    scores of the reference keys of all earlier positions. With ``theta=0`` it is dense
    causal attention. Values are exact. This computes the approximation; it does not
    skip the products that a machine for sparse deltas would skip.

    A reconstruction after Qi et al., DeltaLLM: a training-free framework exploiting
    temporal sparsity for efficient edge LLM inference, 2025; both defaults are chosen
    here.

    Args:
      q, k, v: as in ``sadsl.attention``.
      theta: as in ``reference_keys``.
      window: keys before the query that are exact, besides its own.
      return_lse, options: those of ``sadsl.attention``.

    Raises:
      ValueError: theta or window is negative, or the arrays do not fit.

    Example:
      >>> import jax
      >>> from sadsl import catalog
      >>> attend = lambda q, k, v: catalog.delta_llm(q, k, v, theta=0.5, window=2)
      >>> x = jax.ShapeDtypeStruct((1, 6, 2, 4), "float32")
      >>> jax.eval_shape(attend, x, x, x).shape
      (1, 6, 2, 4)
    """
    at_least("delta_llm", "window", window, 0)
    local = near(window)
    reference = reference_keys(k, theta).keys
    parts = [
        Outcome(*attention(q, keys, v, spec, return_lse=True, **options))
        for keys, spec in ((k, causal() & local), (reference, causal() - local))
    ]
    out, lse = merging.merge(parts)
    assert lse is not None
    return (out, lse) if return_lse else out


def _check_theta(theta: Any) -> None:
    """Refuses a concrete theta that is no distance.

    Raises:
      ValueError: it is negative or not finite.
    """
    if isinstance(theta, int | float) and not 0 <= theta < math.inf:
        raise ValueError(
            f"theta={theta} must be finite and at least 0: it is the distance that an "
            "element of a key may move before it is updated"
        )
