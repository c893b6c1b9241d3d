"""``linear``: attention whose weights are products of features, not exponentials.

Feature maps: "elu1" (``elu(x) + 1``), "relu", "identity", "exp", "softmax" (over the
channels), "taylor" (weights ``1 + s + s ** 2 / 2`` with ``s = q . k``) and "square"
(weights ``s ** 2``). Any other name is a function among the operands of the call,
``operands={"phi": f}``, such as a Flax module; a hashable function itself works too,
such as ``cosformer_features(length)``. A map is applied to q and k in float32,
``[batch, seq, heads, head_dim]``, and may change the last size. Its values are rounded
to bfloat16 if q and k are bfloat16, never to float16.

Normaliser: if that of a query is 0, or within 1e-10 of ``-eps`` (or ``eps``, if that is
less), the query has output 0, lse -inf and zero gradients. Features may be negative; a
normaliser that is small because its terms cancel is still divided by, plus ``eps``. If
no weight can be negative ("elu1", "relu", "exp", "softmax", "taylor", "square"), the
logarithm of the normaliser is the lse, so the term can be part of ``joint``.

Decays: a number or one for each head in (0, 1], or an operand of log-decays. Those
below -60 count as -60. Those above 0 are refused; under ``jit`` they make all later
outputs NaN, and perhaps those of some tokens before. A decay counts all steps between
two tokens, whatever their documents. Heads are those of k, of v, or of q: then the
heads of a group share keys, but each has its state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import LayerSizes, Learned
from sadsl.terms.features import FEATURES, POSITIVE_WEIGHTS, FeatureMap
from sadsl.terms.recurrent import CAUSAL, Decay, Recurrent, factors

READS = "after", "before"


@dataclass(frozen=True, repr=False)
class Linear(Recurrent):
    """Attention with products of features as weights; see ``linear``."""

    feature_map: str | FeatureMap = "elu1"
    decay: Decay = None
    by: str = "head"
    read: str = "after"
    bonus: str | None = None
    map: IndexMap = CAUSAL
    normalise: bool | Literal["channel"] = True
    scaled: bool = False
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if not isinstance(self.feature_map, str) and not callable(self.feature_map):
            raise TypeError(
                f"linear: feature_map={self.feature_map!r} must be one of "
                f"{', '.join(FEATURES)}, the name of an operand, or a function"
            )
        self.check("linear")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"linear: eps={self.eps} must be finite and at least 0")
        if isinstance(self.decay, str) and self.decay == self.feature_map:
            raise ValueError(
                f"linear: {self.decay!r} names both the feature map and the decay: "
                "give one of the two operands another name"
            )
        self._check_read()
        if self.normalise not in (True, False, "channel"):
            raise ValueError(
                f"linear: normalise={self.normalise!r} must be True, False or 'channel'"
            )
        if self.by_channel_sums and (self.decay is not None or self.read == "before"):
            raise ValueError(
                "linear: normalise='channel' makes its own decay and reads after the "
                f"write: it takes no decay={self.decay!r}, no read={self.read!r}"
            )

    def _check_read(self) -> None:
        if self.read not in READS:
            raise ValueError(f"linear: read={self.read!r} must be one of {READS}")
        if self.bonus is not None:
            check_operand_name("linear: bonus", self.bonus, "None")
        if self.bonus is not None and self.read == "after":
            raise ValueError(
                f"linear: bonus={self.bonus!r} weighs the own key of a query that "
                "reads before the write: add read='before'"
            )
        if self.read == "before" and (self.normalise or not self.kind.causal):
            raise ValueError(
                f"linear: read='before' with map={self.map!r} and normalise="
                f"{self.normalise!r}: it needs a causal map and normalise=False"
            )

    @property
    def by_channel_sums(self) -> bool:
        """Whether each key channel is divided by its own sum over the keys."""
        return self.normalise == "channel"

    @property
    def normalises(self) -> bool:
        """Whether it keeps sums of features beside the state."""
        return bool(self.normalise)

    @property
    def positional(self) -> bool:
        """Whether the features of a token depend on its position."""
        return getattr(self.feature_map, "positional", False)

    @property
    def of_call(self) -> frozenset[str]:
        """The bonus."""
        return frozenset(() if self.bonus is None else (self.bonus,))

    @property
    def positive(self) -> bool:
        """Whether it has one normaliser, and no weight is negative."""
        known = isinstance(self.feature_map, str)
        return self.normalise is True and known and self.feature_map in POSITIVE_WEIGHTS

    @property
    def named_features(self) -> str | None:
        """The name of the operand that is its feature map, or None."""
        name = self.feature_map
        return name if isinstance(name, str) and name not in FEATURES else None

    @property
    def operands(self) -> Mapping[str, int]:
        """The segment ids, the operands of log-decays and of the bonus."""
        bonus = {} if self.bonus is None else {self.bonus: 2}
        return {**super().operands, **bonus}

    @property
    def support(self) -> IndexMap | None:
        """Its map, if no weight is negative."""
        return self.map if self.positive else None

    def reads(self, name: str) -> bool:
        """Whether it reads ``name``: an array, its feature map, or the dropout key."""
        return super().reads(name) or name == self.named_features

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The log-decays of every token, and a bonus for each head and channel."""
        found = super().learned(sizes)
        if self.bonus is not None:
            shape = sizes.num_kv_heads, sizes.head_dim
            found[self.bonus] = Learned(shape, start="normal")
        return found

    def __repr__(self) -> str:
        return call_text(self, by_position=1)


def linear(
    feature_map: str | FeatureMap = "elu1",
    decay: Any = None,
    *,
    by: str = "head",
    read: str = "after",
    bonus: str | None = None,
    map: IndexMap | None = None,
    normalise: bool | Literal["channel"] = True,
    scaled: bool = False,
    eps: float = 1e-10,
) -> Linear:
    """Attention whose weights are ``phi(q) . phi(k)``, in time linear in the length.

    ``out_i = sum_j w_ij v_j / (sum_j w_ij + eps)`` with ``w_ij = phi(q_i) . phi(k_j)``
    over the pairs of the map (Katharopoulos et al., Transformers are RNNs, 2020,
    section 3). A decay multiplies ``w_ij`` by the factors of the steps from ``j`` to
    ``i`` (Sun et al., Retentive Network, 2023, section 2): the state is multiplied by
    the factor of a position before the key there is added. The docstring of
    ``sadsl.terms.linear`` lists feature maps, normalisers and decays.

    Args:
      feature_map: the name of a map or of an operand, or a function.
      decay: None; the factor of each step, in (0, 1], one number or one for each head;
        or the name of an operand ``[batch, kv_seq, heads]`` of log-decays, at most 0.
      by: "channel": the operand of log-decays is ``[batch, kv_seq, heads, features]``
        (Yang et al., Gated Linear Attention Transformers, 2024, section 4).
      read: "before": a query reads the state before its own decay and key. Queries and
        keys must then be the same tokens.
      bonus: the name of an operand ``[heads, features]``: with an early read, the own
        key has the weight ``sum(q * bonus * k)`` (Peng et al., Eagle and Finch, 2024).
      map: ``causal()`` (if None), ``full()``, ``segments()``, or ``causal() &
        segments()``. A document may be in several pieces.
      normalise: False yields the plain sum. With "channel" the features of a key are
        logits, and each channel takes their softmax over the visible keys (Qin et al.,
        You Only Scan Once: LightNet, 2024).
      scaled: whether ``sm_scale`` multiplies q before the feature map.
      eps: the number added to the normaliser.

    Raises:
      ValueError: a decay is outside (0, 1], or options do not fit together.
      NotImplementedError: the map is not one of the four.

    Example:
      >>> import sadsl as sa
      >>> sa.linear("relu", decay=0.99)
      linear('relu', decay=0.99)
    """
    return Linear(
        feature_map,
        factors("linear", decay),
        by,
        read,
        bonus,
        CAUSAL if map is None else map,
        normalise if normalise == "channel" else bool(normalise),
        bool(scaled),
        float(eps),
    )
