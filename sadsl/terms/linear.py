"""Linear attention: a product of features in the place of the exponential."""

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
    """``elu(x) + 1``: above 0 everywhere, and as precise far below 0 as above."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    return jnp.maximum(x, 0)


def identity(x: Array) -> Array:
    """The queries and keys as they are."""
    return x


FEATURES: Mapping[str, FeatureMap] = {"elu1": elu1, "relu": relu, "identity": identity}
# The others may have negative features: their normaliser has no logarithm.
NONNEGATIVE = "elu1", "relu"
CAUSAL = causal()


@dataclass(frozen=True)
class Kind:
    """Which keys a query sees: up to its own position, of its own document."""

    causal: bool
    segments: bool


@dataclass(frozen=True, repr=False)
class Linear(Term):
    """Weights that are products of features. See ``linear``, which makes it."""

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
                    f"linear: {self.decay!r} names both the feature map and the decay"
                )
            return
        for value in () if self.decay is None else np.ravel(self.decay):
            if not 0 < value <= 1:
                raise ValueError(
                    f"linear: decay={self.decay!r} must be in (0, 1], the factor of "
                    "the state a step; 1 forgets nothing"
                )

    @property
    def kind(self) -> Kind:
        """Which of the four maps it has.

        Raises:
          NotImplementedError: another one.
        """
        return _kind(self.map)

    @property
    def positive(self) -> bool:
        """Whether its normaliser is a sum of weights that are none of them negative."""
        return self.normalise and self.feature_map in NONNEGATIVE

    @property
    def named_features(self) -> str | None:
        """The operand that is its feature map, if one is."""
        name = self.feature_map
        return name if isinstance(name, str) and name not in FEATURES else None

    @property
    def operands(self) -> Mapping[str, int]:
        """Segment ids, and log-decays that are given."""
        found = dict.fromkeys(SEGMENT_IDS, 1) if self.kind.segments else {}
        return found | ({self.decay: 2} if isinstance(self.decay, str) else {})

    @property
    def support(self) -> IndexMap | None:
        """Its map, if the weights of its pairs are none of them negative."""
        return self.map if self.positive else None

    def reads(self, name: str) -> bool:
        """Its arrays and its feature map; dropout gets as far as an error."""
        known = (*self.operands, *operands_of(self.map))
        return name in known or name in (self.named_features, DROPOUT_KEY)

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """Log-decays of every token, one a key head."""
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
    section 3). With a decay, ``w_ij`` is multiplied by the factors of the steps from
    ``j`` to ``i`` (Sun et al., Retentive Network, 2023, section 2): the state is
    multiplied by the factor of a position before it takes in the key there. Neither
    ``sm_scale`` nor a soft cap applies; scale in the feature map.

    A query whose normaliser vanishes has output 0, lse -inf and zero gradients: where
    it is 0, or within 1e-10 of ``-eps`` (or ``eps``, where that is less). Features may
    be negative; then a sum that cancels is divided by as it is, plus ``eps``. With
    "elu1" and "relu" the logarithm of the normaliser is the lse, so that the term has a
    place in ``joint``.

    Args:
      feature_map: "elu1", "relu", "identity", or another name: a function among the
        operands of the call, ``operands={"phi": f}``, such as a Flax module. Or a
        hashable function itself, which has no text. It is applied to q and k in
        float32, ``[batch, seq, heads, head_dim]``, and may change the last size. Its
        values are rounded to bfloat16 if q and k have that dtype, never to float16.
      decay: None; the factor of a step, in (0, 1], or a tuple of one a head; or the
        name of an operand ``[batch, kv_seq, heads]`` of log-decays of at most 0, which
        has a gradient. Values below -60 count as -60; values above 0 are refused, and
        under ``jit`` make what comes after them NaN. Heads are those of k, or those of
        q: then a group shares keys but no state.
      map: ``causal()`` (if None), ``full()``, ``segments()``, or ``causal() &
        segments()``. A document may lie in several pieces: tokens are sorted by
        document, unless the ids are known to be in order when the call is traced. A
        decay counts all steps between two tokens, whatever their documents.
      normalise: False yields the plain sum.
      eps: added to the normaliser.

    Raises:
      ValueError: a decay outside of (0, 1], or with a map that is not causal.
      NotImplementedError: another map.
    """
    if decay is not None and not isinstance(decay, str):
        values = np.asarray(decay, np.float64)
        if values.ndim > 1:
            raise ValueError(f"linear: decay={decay!r} must be one number a head")
        decay = tuple(values.tolist()) if values.ndim else float(values)
    chosen = CAUSAL if map is None else map
    return Linear(feature_map, decay, chosen, bool(normalise), float(eps))


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
    """What a map demands of a pair, in normal form."""
    node = simplify(map.node)
    return frozenset(node.terms if isinstance(node, ir.And) else (node,))
