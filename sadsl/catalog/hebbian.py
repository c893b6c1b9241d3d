"""Attention as a Hebbian memory of pairs of a key and a value."""

from typing import Literal, TypeAlias

from sadsl.maps.base import IndexMap
from sadsl.terms.delta import Delta, delta
from sadsl.terms.linear import Linear, linear

Rule: TypeAlias = Literal["hebb", "delta", "decay"]


def hebbian(
    rule: Rule = "hebb",
    *,
    decay: float | str = 0.99,
    beta: float | str = "beta",
    map: IndexMap | None = None,
) -> Linear | Delta:
    """Linear attention without a normaliser, by one of three rules of plasticity.

    Keys are conditional stimuli, values unconditional ones, queries test stimuli
    (Understanding transformers through the lens of Pavlovian conditioning, 2025; the
    authors' body of the paper was not read)::

        "hebb"     S <- S + k v^T                      o = S^T q
        "decay"    S <- decay S + k v^T
        "delta"    S <- S + beta k (v - S^T k)^T

    The exact forms of "decay" and "delta" are a reconstruction. If the keys are
    orthonormal and a query is one of them, "hebb" returns its value exactly; with ``n``
    random keys of unit length, the error grows as ``sqrt(n / d)``. Keys are taken as
    they are. Queries are too, except by "delta": pass ``sm_scale=1.0`` to the call.

    Args:
      rule: how a token changes the memory.
      decay: for "decay": the factor of a step in (0, 1], or the name of an operand of
        log-decays ``[batch, seq, heads]``.
      beta: for "delta": a number in [0, 2], or the name of an operand ``[batch, seq,
        heads]``.
      map: as in ``sadsl.linear``.

    Raises:
      ValueError: there is no such rule, or a number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> from sadsl import catalog
      >>> keys = jnp.eye(2).reshape(1, 2, 1, 2)
      >>> out = sa.attention(keys[:, ::-1], keys, 7 * keys, catalog.hebbian())
      >>> out[0, 1, 0].tolist()  # the query is the first key
      [7.0, 0.0]
    """
    match rule:
        case "hebb":
            return linear("identity", map=map, normalise=False)
        case "decay":
            return linear("identity", decay, map=map, normalise=False)
        case "delta":
            return delta(beta, map=map, normalise_keys=False)
    raise ValueError(f"rule={rule!r} must be 'hebb', 'delta' or 'decay'")
