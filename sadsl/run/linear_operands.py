"""Checks the operands of a ``linear`` term: feature map, log-decays, segment ids."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.linear import STRONGEST
from pallas_kernels.precision import wide, widened
from sadsl.maps.integers import integers
from sadsl.terms.linear import FEATURES, Linear


def features_of(
    term: Linear, given: Mapping[str, Any]
) -> Callable[[Array, str], Array]:
    """The feature map of a call as ``phi(x, name)``; ``name`` is "q" or "k".

    The map and its derivatives are computed in float32. The result is rounded to
    ``product_dtype(x.dtype)``.

    Raises:
      ValueError: the function was not given, or its result is not shaped ``[batch, seq,
        heads, features]``.
    """
    phi = term.feature_map
    if term.named_features is not None:
        phi = given.get(term.named_features)
        if not callable(phi):
            found = "was not given" if phi is None else f"is {type(phi).__name__}"
            raise ValueError(
                f"{term!r} asks for a function {term.named_features!r}, which {found}: "
                f"pass operands={{{term.named_features!r}: f}}, or use one of the "
                f"built-in maps {', '.join(FEATURES)}"
            )
    elif isinstance(phi, str):
        phi = FEATURES[phi]

    def apply(x: Array, name: str) -> Array:
        y = phi(widened(x))
        if y.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{term!r}: the feature map turns {name} of shape {x.shape} into "
                f"{y.shape}: it may change the last size only"
            )
        return y.astype(product_dtype(x.dtype))

    return apply


def product_dtype(dtype: Any) -> Any:
    """The dtype of the features of inputs of ``dtype``: float32 for float16.

    Features are exponentials, and cotangents are divided by their sum: both leave the
    range of float16. bfloat16 has the range of float32.
    """
    return jnp.float32 if dtype == jnp.float16 else dtype


def log_decays(
    term: Linear, given: Mapping[str, Any], q_and_k: tuple[Any, Any], q_offset: int
) -> Array | None:
    """The log-decays of all positions, ``[batch or 1, heads or 1, positions]``.

    None for a term without decay.

    Raises:
      ValueError: they were not given, or do not fit ``q_and_k``.
    """
    if term.decay is None:
        return None
    (batch, q_seq, num_q_heads, _), (_, kv_seq, num_kv_heads, _) = (
        x.shape for x in q_and_k
    )
    positions = max(kv_seq, q_offset + q_seq)
    dtype = wide(q_and_k[0].dtype)
    if isinstance(term.decay, str):
        decay = given_log_decay(term, given, (batch, kv_seq)).astype(dtype)
        decay = jnp.swapaxes(decay, 1, 2)
        if positions > kv_seq:
            raise ValueError(
                f"{term!r}: queries up to position {positions - 1} come after the last "
                f"of {kv_seq} keys, where {term.decay!r} says no decay: pass keys and "
                "decays up to the last query"
            )
    else:
        values = jnp.asarray(np.log(np.atleast_1d(term.decay)), dtype)
        decay = jnp.broadcast_to(values[None, :, None], (1, len(values), positions))
    check_decay_heads(term, decay.shape[1], num_q_heads, num_kv_heads)
    return decay


def check_decay_heads(
    term: Linear, heads: int, num_q_heads: int, num_kv_heads: int
) -> None:
    """Refuses decays whose number of heads is not 1, that of k or that of q."""
    if heads not in (1, num_kv_heads, num_q_heads):
        raise ValueError(
            f"{term!r} has decays of {heads} heads: give one decay, or one for each of "
            f"the {num_kv_heads} heads of k or the {num_q_heads} of q"
        )


def given_log_decay(
    term: Linear, given: Mapping[str, Any], lead: tuple[int, ...]
) -> Array:
    """The operand of log-decays, ``[*lead, heads]``, where ``lead[0]`` may be 1.

    Raises:
      ValueError: it was not given, has another shape or dtype, or values above 0.
    """
    name = term.decay
    assert isinstance(name, str)
    shape = ", ".join(map(str, (*lead, "heads")))
    if name not in given:
        raise ValueError(
            f"{term!r} reads log-decays from {name!r}, which was not given: pass "
            f"operands={{{name!r}: array}} of shape [{shape}]"
        )
    x = jnp.asarray(given[name])
    if x.ndim == len(lead):
        x = x[None]
    fits = x.ndim == len(lead) + 1 and x.shape[0] in (1, lead[0])
    if not fits or x.shape[1:-1] != lead[1:]:
        raise ValueError(
            f"operand {name!r} has shape {x.shape}: log-decays must be [{shape}]"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"operand {name!r} has dtype {x.dtype}: it must be of floats")
    # In NumPy, since under jit a jax operation on known values yields a tracer.
    known = None if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float32)
    if known is not None and (known > 0).any():
        raise ValueError(
            f"operand {name!r} holds {known.max():.3g}: log-decays must be at most "
            "0, such as those of jax.nn.log_sigmoid"
        )
    # Traced values cannot be refused, so a value above 0 becomes NaN.
    return jnp.where(x > 0, jnp.nan, x)


def segment_ids(name: str, given: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
    """The operand ``name`` of document ids, broadcast to ``shape``, int32.

    The batch axis of the operand may be 1 or missing.

    Raises:
      ValueError: it was not given, has another shape, or does not hold integers.
    """
    if name not in given:
        raise ValueError(f"linear over segments() reads {name}: pass it")
    ids = integers(name, given[name])
    if ids.shape not in (shape[1:], (1, *shape[1:]), shape):
        raise ValueError(f"{name} has shape {ids.shape}: it must be {shape}")
    return jnp.broadcast_to(ids.astype(jnp.int32), shape)


def clipped(log_decay: Any) -> Any:
    """Log-decays clipped to ``[STRONGEST, 0]``."""
    return jnp.clip(log_decay, STRONGEST, 0.0)
