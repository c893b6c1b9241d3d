"""Selects the keys of the highest attention that a low-rank predictor expects.

Wei et al., Sparsifiner: learning sparse instance-dependent attention for efficient
vision transformers, 2023, section 3. A predictor fits one number of tokens only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from sadsl.maps.base import at_least
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, NamedSelection
from sadsl.selections.key_topw import descending_ranks

# A budget such as 0.1 * 30 is meant to be 3, not 3.0000000000000004.
ROUNDING = 1e-9


class Predictor(NamedTuple):
    """The weights of the predictor, each with a batch axis (of 1 or more) in front.

    ``q`` and ``k`` are ``[heads or 1, head_dim + 1, width]``, whose last row is the
    bias; ``down`` and ``basis`` are ``[tokens, rank]``.
    """

    q: Array
    k: Array
    down: Array
    basis: Array


@dataclass(frozen=True, repr=False)
class FactorisedTopk(NamedSelection):
    """The keys of the highest predicted attention; made by ``factorised_topk``."""

    keep: float = 0.25
    coefs: int = 8
    threshold: float = 0.02
    full_rows: int = 1
    scale: float | None = None
    predictor: str = "predictor"

    def __post_init__(self) -> None:
        at_least("factorised_topk", "coefs", self.coefs, 1)
        at_least("factorised_topk", "full_rows", self.full_rows, 0)
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"factorised_topk: keep={self.keep} must be a share of the keys, above "
                "0 and at most 1"
            )
        if not self.threshold >= 0:
            raise ValueError(
                f"factorised_topk: threshold={self.threshold} must be at least 0"
            )

    @property
    def leak(self) -> Leak:  # type: ignore[override]
        """Always "all": the coefficients of a query depend on every token."""
        return "all"

    @property
    @override
    def operands(self) -> Mapping[str, int]:
        ranks = zip(Predictor._fields, (3, 3, 2, 2), strict=True)
        return {f"{self.predictor}_{name}": rank for name, rank in ranks}

    @override
    def choose(self, content: Content) -> Mapping[str, Array]:
        weights = self._weights(content)
        scale = content.sm_scale if self.scale is None else self.scale
        keys = content.keys()
        # A key that is not finite does not influence the others and is never chosen.
        finite = jnp.isfinite(keys).all(axis=-1)
        keys = jnp.where(finite[..., None], keys, 0.0)
        coefs = coefficients(content.queries(), keys, weights, scale)
        coefs = jnp.where(descending_ranks(coefs) < self.coefs, coefs, 0.0)
        size = jnp.abs(weights.basis)
        scores = _expand(coefs, jnp.where(size > self.threshold, size, 0.0))
        budget = math.ceil(self.keep * scores.shape[-1] - ROUNDING)
        scores = jnp.where(finite[:, :, None], scores, jnp.nan)
        chosen = (descending_ranks(scores) < budget) & jnp.isfinite(scores)
        return {"chosen": chosen}

    def _weights(self, content: Content) -> Predictor:
        _, heads, length, head_dim = content.q.shape
        if content.k.shape[2] != length or content.q_offset:
            raise ValueError(
                f"factorised_topk needs as many queries as keys, not {length} queries "
                f"from position {content.q_offset} on and {content.k.shape[2]} keys: "
                "pass q and k of the same length, and no q_offset"
            )
        made = [
            content.operand(name, f"a weight of the predictor of {self!r}")
            for name in self.operands
        ]
        weights = Predictor(*(x.astype(jnp.float32) for x in made))
        _check(weights, heads, length, head_dim, self.predictor)
        return weights

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        chosen = self.part("chosen")[h, q, k] == 1
        return chosen | (q < self.full_rows) if self.full_rows else chosen


def factorised_topk(
    keep: float = 0.25,
    coefs: int = 8,
    threshold: float = 0.02,
    *,
    full_rows: int = 1,
    scale: float | None = None,
    predictor: str = "predictor",
) -> FactorisedTopk:
    """A query sees the ``keep * n`` keys of the highest predicted attention.

    Wei et al., Sparsifiner, 2023, section 3. The predictor projects queries and keys to
    a small width and mixes the ``n`` keys into ``rank`` tokens. A softmax over these
    gives each query its coefficients, which combine a learned basis of attention rows.
    Where fewer keys than the budget have a score above 0, the first others are added.
    The choice takes ``n * n`` bools a head.

    The call needs four operands: ``predictor_q`` and ``predictor_k``, ``[heads or 1,
    head_dim + 1, width]`` with a bias as the last row, ``predictor_down`` and
    ``predictor_basis``, ``[n, rank]``.

    Args:
      keep: the share of the keys that a query keeps, rounded up.
      coefs: how many coefficients are kept, the largest ones.
      threshold: entries of the basis of at most this size count as 0.
      full_rows: how many of the first queries see every key, as a class token does.
      scale: the factor before the softmax over the basis; that of the call if None. The
        released code uses ``num_heads ** -0.5``.
      predictor: the prefix of the names of the operands.

    Raises:
      ValueError: ``keep``, ``threshold`` or a size is out of range; in a call, q and k
        differ in length, or a weight is missing or of another shape.

    Example:
      >>> from sadsl.selections import factorised_topk
      >>> factorised_topk(0.1).operands  # the number of axes of each
      {'predictor_q': 3, 'predictor_k': 3, 'predictor_down': 2, 'predictor_basis': 2}
    """
    return FactorisedTopk(keep, coefs, threshold, full_rows, scale, predictor)


def coefficients(
    q: Float[Array, "batch heads n head_dim"],
    k: Float[Array, "batch heads n head_dim"],
    weights: Predictor,
    scale: float,
) -> Float[Array, "batch heads n rank"]:
    """The coefficients with which each query combines the rows of the basis."""
    narrow_q, narrow_k = _linear(q, weights.q), _linear(k, weights.k)
    mixed = jnp.matmul(
        jnp.swapaxes(weights.down, -1, -2)[:, None], narrow_k, precision="highest"
    )
    products = jnp.matmul(narrow_q, jnp.swapaxes(mixed, -1, -2), precision="highest")
    return jax.nn.softmax(products * scale, axis=-1)


def predicted(
    q: Float[Array, "batch heads n head_dim"],
    k: Float[Array, "batch heads n head_dim"],
    weights: Predictor,
    scale: float,
) -> Float[Array, "batch heads n n"]:
    """The predicted attention, for training the predictor; nothing is set to 0."""
    return _expand(coefficients(q, k, weights, scale), weights.basis)


def _linear(x: Array, weight: Array) -> Array:
    """``x @ weight[:-1] + weight[-1]``."""
    made = jnp.matmul(x, weight[..., :-1, :], precision="highest")
    return made + weight[..., -1:, :]


def _expand(coefs: Array, basis: Array) -> Array:
    """``coefs @ basis.T``: ``[batch, heads, n, rank]`` to ``[batch, heads, n, n]``."""
    rows = jnp.swapaxes(basis, -1, -2)[:, None]
    return jnp.matmul(coefs, rows, precision="highest")


def _check(
    weights: Predictor, heads: int, length: int, head_dim: int, name: str
) -> None:
    """Raises a ``ValueError`` unless the shapes of the weights fit the call."""
    width, rank = weights.q.shape[-1], weights.down.shape[-1]
    narrow, tall = (head_dim + 1, width), (length, rank)
    wanted = {"q": narrow, "k": narrow, "down": tall, "basis": tall}
    for field, shape in wanted.items():
        found = getattr(weights, field).shape[1:]
        fits = found[-2:] == shape
        if field in ("q", "k"):
            fits &= found[0] in (1, heads)
            shape = (heads, *shape)
        if not fits:
            raise ValueError(
                f"operand '{name}_{field}' has shape {found} without its batch axis: "
                f"for {length} tokens, {heads} heads and head_dim {head_dim} it must "
                f"be {shape}; a predictor fits one number of tokens only"
            )
