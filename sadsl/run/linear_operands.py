"""Checks the operands of recurrent terms: feature map, log-decays, segment ids."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.precision import wide, widened
from sadsl.maps.integers import integers
from sadsl.terms.features import FEATURES
from sadsl.terms.linear import Linear
from sadsl.terms.recurrent import Recurrent


def features_of(
    term: Linear, given: Mapping[str, Any]
) -> Callable[[Array, str, Array], Array]:
    """The feature map of a call as ``phi(x, name, positions)``; ``name`` is "q" or "k".

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

    def apply(x: Array, name: str, positions: Array) -> Array:
        at = (positions,) if getattr(phi, "positional", False) else ()
        y = phi(widened(x), *at)
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
    term: Recurrent, given: Mapping[str, Any], shapes: tuple[Any, Any, Any], offset: int
) -> Array | None:
    """The log-decays of all positions, ``[batch or 1, heads or 1, positions, ...]``.

    ``shapes`` are q, k and v, and ``offset`` is the position of the first query. None
    for a term without decay.

    Raises:
      ValueError: they were not given, or do not fit the call.
    """
    if term.decay is None:
        return None
    q, k, _ = shapes
    positions = max(k.shape[1], offset + q.shape[1])
    dtype = wide(q.dtype)
    if isinstance(term.decay, str):
        axes = (k.shape[-1],) if term.by == "channel" else ()
        decay = given_log_decay(term, given, k.shape[:2], axes)
        decay = jnp.swapaxes(decay, 1, 2).astype(dtype)
        if positions > k.shape[1]:
            raise ValueError(
                f"{term!r}: queries up to position {positions - 1} come after the last "
                f"of {k.shape[1]} keys, where {term.decay!r} says no decay: pass keys "
                "and decays up to the last query"
            )
    else:
        values = jnp.asarray(np.log(np.atleast_1d(term.decay)), dtype)
        decay = jnp.broadcast_to(values[None, :, None], (1, len(values), positions))
    _check_heads(term, "decays", decay.shape[1], shapes)
    return decay


def _check_heads(
    term: Recurrent, what: str, heads: int, shapes: tuple[Any, Any, Any]
) -> None:
    """Refuses operands whose number of heads is not 1, or that of q, k or v.

    Raises:
      ValueError: they have another number of heads.
    """
    q, k, v = (x.shape[2] for x in shapes)
    if heads not in (1, q, k, v):
        of_v = "" if v == k else f", the {v} of v"
        raise ValueError(
            f"{term!r} has {what} of {heads} heads: give one, or one for each of the "
            f"{k} heads of k{of_v} or the {q} of q"
        )


def given_log_decay(
    term: Recurrent,
    given: Mapping[str, Any],
    lead: tuple[int, ...],
    channels: tuple[int, ...] = (),
) -> Array:
    """The operand of log-decays, ``[*lead, heads, *channels]``; ``lead[0]`` may be 1.

    Raises:
      ValueError: it was not given, has another shape or dtype, or values above 0.
    """
    assert isinstance(term.decay, str)
    x = float_operand(term, given, term.decay, (*lead, None, *channels), "log-decays")
    # In NumPy, since under jit a jax operation on known values yields a tracer.
    known = None if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float32)
    if known is not None and (known > 0).any():
        raise ValueError(
            f"operand {term.decay!r} holds {known.max():.3g}: log-decays must be at "
            "most 0, such as those of jax.nn.log_sigmoid"
        )
    # Traced values cannot be refused, so a value above 0 becomes NaN.
    return jnp.where(x > 0, jnp.nan, x)


def float_operand(
    term: Recurrent,
    given: Mapping[str, Any],
    name: str,
    shape: tuple[int | None, ...],
    what: str,
) -> Array:
    """An operand of floats of ``shape``, where None is any number of heads.

    The first axis, the batch, may be 1 or missing.

    Raises:
      ValueError: it was not given, or has another shape or dtype.
    """
    shown = ", ".join("heads" if size is None else str(size) for size in shape)
    if name not in given:
        raise ValueError(
            f"{term!r} reads {what} from {name!r}, which was not given: pass "
            f"operands={{{name!r}: array}} of shape [{shown}]"
        )
    x = jnp.asarray(given[name])
    if x.ndim == len(shape) - 1:
        x = x[None]
    fits = x.ndim == len(shape) and x.shape[0] in (1, shape[0])
    if not fits or any(
        size not in (None, found)
        for size, found in zip(shape[1:], x.shape[1:], strict=True)
    ):
        raise ValueError(
            f"operand {name!r} has shape {x.shape}: {what} must be [{shown}]"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"operand {name!r} has dtype {x.dtype}: it must be of floats")
    return x


def token_operand(
    term: Recurrent,
    given: Mapping[str, Any],
    name: str,
    what: str,
    shapes: tuple[Any, Any, Any],
    *,
    by_channel: bool,
) -> Array:
    """An operand of every key, ``[batch, kv_seq, heads]`` or with key channels.

    ``shapes`` are q, k and v.

    Raises:
      ValueError: it was not given, or does not fit them.
    """
    k = shapes[1]
    axes = (k.shape[-1],) if by_channel else ()
    x = float_operand(term, given, name, (*k.shape[:2], None, *axes), what)
    _check_heads(term, what, x.shape[2], shapes)
    return jnp.broadcast_to(x, (k.shape[0], *x.shape[1:]))


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
