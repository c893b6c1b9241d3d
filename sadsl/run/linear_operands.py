"""What a call gives a linear term, checked: features, log-decays, documents."""

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
    """The feature map of a call: ``phi(x, name)``, in ``product_dtype(x.dtype)``.

    The map is applied in float32, as are its derivatives.

    Raises:
      ValueError: it was not given; or what it yields has another shape than ``[batch,
        seq, heads, features]``.
    """
    phi = term.feature_map
    if term.named_features is not None:
        phi = given.get(term.named_features)
        if not callable(phi):
            found = "was not given" if phi is None else f"is {type(phi).__name__}"
            raise ValueError(
                f"{term!r} asks for a function {term.named_features!r}, which {found}: "
                f"pass operands={{{term.named_features!r}: f}}; known without are "
                f"{', '.join(FEATURES)}"
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
    """The dtype of features, for inputs of ``dtype``, and of what they are summed in.

    Features are exponentials, and a cotangent is divided by their sum: both leave the
    range of float16. bfloat16 has the range of float32.
    """
    return jnp.float32 if dtype == jnp.float16 else dtype


def log_decays(
    term: Linear, given: Mapping[str, Any], q_and_k: tuple[Any, Any], q_offset: int
) -> Array | None:
    """Log-decays of all positions, ``[batch or 1, heads or 1, positions]``.

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
                f"of {kv_seq} keys, where {term.decay!r} says no decay: pass as many "
                "keys"
            )
    else:
        values = jnp.asarray(np.log(np.atleast_1d(term.decay)), dtype)
        decay = jnp.broadcast_to(values[None, :, None], (1, len(values), positions))
    check_decay_heads(term, decay.shape[1], num_q_heads, num_kv_heads)
    return decay


def check_decay_heads(
    term: Linear, heads: int, num_q_heads: int, num_kv_heads: int
) -> None:
    """Refuses a number of decays that is no number of heads."""
    if heads not in (1, num_kv_heads, num_q_heads):
        raise ValueError(
            f"{term!r} has decays of {heads} heads: must be one, or one for each of "
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
    # In NumPy: under jit, an operation on known values yields traced ones.
    known = None if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float32)
    if known is not None and (known > 0).any():
        raise ValueError(
            f"operand {name!r} holds {known.max():.3g}: log-decays must be at most "
            "0, such as those of jax.nn.log_sigmoid"
        )
    # Traced values cannot be refused.
    return jnp.where(x > 0, jnp.nan, x)


def segment_ids(name: str, given: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
    """The ids of documents, int32 of ``shape``, whose batch may be missing or 1.

    Raises:
      ValueError: they were not given, have another shape, or are no integers.
    """
    if name not in given:
        raise ValueError(f"linear over segments() reads {name}: pass it")
    ids = integers(name, given[name])
    if ids.shape not in (shape[1:], (1, *shape[1:]), shape):
        raise ValueError(f"{name} has shape {ids.shape}: it must be {shape}")
    return jnp.broadcast_to(ids.astype(jnp.int32), shape)


def clipped(log_decay: Any) -> Any:
    """Log-decays as they count."""
    return jnp.clip(log_decay, STRONGEST, 0.0)
