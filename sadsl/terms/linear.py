"""``linear``: attention whose weights are products of features, not exponentials."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowering import ir
from lowering.expr.simplify import simplify
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.named import causal, full, segments
from sadsl.selections.base import operands_of
from sadsl.terms.base import DROPOUT_KEY, LayerSizes, Learned, Term

FeatureMap = Callable[[Array], Array]
SEGMENT_IDS = "q_segment_ids", "kv_segment_ids"


def elu1(x: Array) -> Array:
    """``elu(x) + 1``: positive everywhere, without cancellation far below 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    return jnp.maximum(x, 0)


def identity(x: Array) -> Array:
    """``x`` unchanged."""
    return x


FEATURES: Mapping[str, FeatureMap] = {"elu1": elu1, "relu": relu, "identity": identity}
# Other feature maps may be negative, and then the normaliser has no logarithm.
NONNEGATIVE = "elu1", "relu"
CAUSAL = causal()


@dataclass(frozen=True)
class Kind:
    """Which keys a query sees.

    Attributes:
      causal: only keys at its position or before.
      segments: only keys of its own document.
    """

    causal: bool
    segments: bool


@dataclass(frozen=True, repr=False)
class Linear(Term):
    """Attention with products of features as weights; see ``linear``."""

    feature_map: str | FeatureMap = "elu1"
    decay: float | tuple[float, ...] | str | None = None
    map: IndexMap = CAUSAL
    normalise: bool = True
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if not isinstance(self.feature_map, str) and not callable(self.feature_map):
            raise TypeError(
                f"linear: feature_map={self.feature_map!r} must be one of "
                f"{', '.join(FEATURES)}, the name of an operand, or a function"
            )
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"linear takes an index map, not {self.map!r}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"linear: eps={self.eps} must be finite and at least 0")
        if self.decay is not None and not self.kind.causal:
            raise ValueError(
                f"linear: decay={self.decay!r} with map={self.map!r}: a decay counts "
                "the steps since a key, so the map must be causal: use causal(), "
                "causal() & segments(), or decay=None"
            )
        if isinstance(self.decay, str):
            if self.decay == self.feature_map:
                raise ValueError(
                    f"linear: {self.decay!r} names both the feature map and the decay: "
                    "give one of the two operands another name"
                )
            return
        for value in () if self.decay is None else np.ravel(self.decay):
            if not 0 < value <= 1:
                raise ValueError(
                    f"linear: decay={self.decay!r} must be in (0, 1]: it multiplies "
                    "the state at each step, and 1 forgets nothing"
                )

    @property
    def kind(self) -> Kind:
        """Which of the four supported maps it has.

        Raises:
          NotImplementedError: it has another map.
        """
        return _kind(self.map)

    @property
    def positive(self) -> bool:
        """Whether it has a normaliser, and no weight is negative."""
        return self.normalise and self.feature_map in NONNEGATIVE

    @property
    def named_features(self) -> str | None:
        """The name of the operand that is its feature map, or None."""
        name = self.feature_map
        return name if isinstance(name, str) and name not in FEATURES else None

    @property
    def operands(self) -> Mapping[str, int]:
        """The segment ids, and the operand of log-decays."""
        found = dict.fromkeys(SEGMENT_IDS, 1) if self.kind.segments else {}
        return found | ({self.decay: 2} if isinstance(self.decay, str) else {})

    @property
    def support(self) -> IndexMap | None:
        """Its map, if no weight is negative."""
        return self.map if self.positive else None

    def reads(self, name: str) -> bool:
        """Whether it reads ``name``: an array, its feature map, or the dropout key.

        It accepts the dropout key so that ``attend`` can raise a clear error.
        """
        known = (*self.operands, *operands_of(self.map))
        return name in known or name in (self.named_features, DROPOUT_KEY)

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The log-decays of every token, one for each key head."""
        if not isinstance(self.decay, str):
            return {}
        shape = (sizes.num_kv_heads,)
        return {self.decay: Learned(shape, per_query=True, squash="log_sigmoid")}

    def __repr__(self) -> str:
        return call_text(self, by_position=1)


def linear(
    feature_map: str | FeatureMap = "elu1",
    decay: Any = None,
    *,
    map: IndexMap | None = None,
    normalise: bool = True,
    eps: float = 1e-10,
) -> Linear:
    """Attention whose weights are ``phi(q) . phi(k)``, in time linear in the length.

    ``out_i = sum_j w_ij v_j / (sum_j w_ij + eps)`` with ``w_ij = phi(q_i) . phi(k_j)``
    over the pairs of the map (Katharopoulos et al., Transformers are RNNs, 2020,
    section 3). A decay multiplies ``w_ij`` by the factors of the steps from ``j`` to
    ``i`` (Sun et al., Retentive Network, 2023, section 2): the state is multiplied by
    the factor of a position before the key there is added. ``sm_scale`` and a soft cap
    do not apply; scale in the feature map.

    If the normaliser of a query is 0, or within 1e-10 of ``-eps`` (or ``eps``, if that
    is less), the query has output 0, lse -inf and zero gradients. Features may be
    negative; a normaliser that is small because its terms cancel is still divided by,
    plus ``eps``. With "elu1" and "relu" the logarithm of the normaliser is the lse, so
    the term can be part of ``joint``.

    Args:
      feature_map: "elu1", "relu", "identity", or another name: a function among the
        operands of the call, ``operands={"phi": f}``, such as a Flax module. A hashable
        function itself works too, but the term then has no text. It is applied to q
        and k in float32, ``[batch, seq, heads, head_dim]``, and may change the last
        size. Its values are rounded to bfloat16 if q and k are bfloat16, never to
        float16.
      decay: None; the factor of each step, in (0, 1], one number or a tuple with one
        for each head; or the name of an operand ``[batch, kv_seq, heads]`` of
        log-decays, at most 0, which has a gradient. Log-decays below -60 count as -60.
        Those above 0 are refused; under ``jit`` they make all later outputs NaN. Heads
        are those of k, or those of q: then the heads of a group share keys, but each
        has its state.
      map: ``causal()`` (if None), ``full()``, ``segments()``, or ``causal() &
        segments()``. A document may be in several pieces: tokens are sorted by
        document, unless the ids are known to be in order when the call is traced. A
        decay counts all steps between two tokens, whatever their documents.
      normalise: False yields the plain sum.
      eps: the number added to the normaliser.

    Raises:
      ValueError: a decay is outside (0, 1], or the map with it is not causal.
      NotImplementedError: the map is not one of the four. Without a decay, the call
        raises it.

    Example:
      >>> import sadsl as sa
      >>> sa.linear("relu", decay=0.99)
      linear('relu', decay=0.99)
      >>> sa.linear().support  # no weight is negative: it can be part of joint(...)
      causal()
      >>> sa.linear("identity").support is None
      True
    """
    chosen = CAUSAL if map is None else map
    return Linear(feature_map, _factors(decay), chosen, bool(normalise), float(eps))


def _factors(decay: Any) -> float | tuple[float, ...] | str | None:
    """A decay as ``Linear`` keeps it: a number, a tuple of one for each head, a name.

    Raises:
      ValueError: it has more than one axis.
    """
    if decay is None or isinstance(decay, str):
        return decay
    values = np.asarray(decay, np.float64)
    if values.ndim > 1:
        raise ValueError(
            f"linear: decay={decay!r} must be one number, or one for each head"
        )
    return tuple(values.tolist()) if values.ndim else float(values)


@lru_cache(maxsize=512)
def _kind(map: IndexMap) -> Kind:
    known = {
        _conjuncts(full()): Kind(causal=False, segments=False),
        _conjuncts(causal()): Kind(causal=True, segments=False),
        _conjuncts(segments()): Kind(causal=False, segments=True),
        _conjuncts(causal() & segments()): Kind(causal=True, segments=True),
    }
    found = known.get(_conjuncts(map))
    if found is None:
        raise NotImplementedError(
            f"linear: map={map!r} has no recurrence here: use causal(), full(), "
            "segments() or causal() & segments(), or softmax(map)"
        )
    return found


def _conjuncts(map: IndexMap) -> frozenset[ir.Pred]:
    """The conditions that a map puts on a pair, simplified; equal for equal maps."""
    node = simplify(map.node)
    return frozenset(node.terms if isinstance(node, ir.And) else (node,))
