"""``Recurrent``: what ``linear`` and ``delta`` have in common, a map and a decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from lowering import ir
from lowering.expr.simplify import simplify
from sadsl.maps.base import IndexMap
from sadsl.maps.named import causal, full, segments
from sadsl.maps.operand_names import check_operand_name
from sadsl.selections.base import operands_of
from sadsl.terms.base import STATE, LayerSizes, Learned, Term, is_dropout

SEGMENT_IDS = "q_segment_ids", "kv_segment_ids"
CAUSAL = causal()
GATES = "head", "channel"

Decay: TypeAlias = float | tuple[float, ...] | str | None


@dataclass(frozen=True)
class Kind:
    """Which keys a query sees.

    Attributes:
      causal: only keys at its position or before.
      segments: only keys of its own document.
    """

    causal: bool
    segments: bool


class Recurrent(Term):
    """A term with a state that every key updates and every query reads.

    A subclass is a frozen dataclass with fields ``decay``, ``by`` and ``map``.
    """

    more_values = True

    @property
    def decay(self) -> Decay:
        """The factor of the state in a step.

        A number, one for each head, the name of an operand of log-decays, or None.
        """
        raise NotImplementedError

    @property
    def by(self) -> str:
        """Either "head", or "channel": the log-decays have an axis of key channels."""
        raise NotImplementedError

    @property
    def map(self) -> IndexMap:
        """One of the four maps of ``Kind``."""
        raise NotImplementedError

    @property
    def positive(self) -> bool:
        """Whether it has one normaliser, and no weight is negative."""
        return False

    @property
    def normalises(self) -> bool:
        """Whether it keeps sums of features beside the state."""
        return False

    @property
    def by_channel_sums(self) -> bool:
        """Whether each key channel is divided by its own sum over the keys."""
        return False

    @property
    def positional(self) -> bool:
        """Whether the features of a token depend on its position."""
        return False

    @property
    def steps(self) -> int:
        """How many keys a token writes."""
        return 1

    @property
    def of_call(self) -> frozenset[str]:
        """The operands that are the same for all tokens."""
        return frozenset()

    @property
    def of_keys(self) -> frozenset[str]:
        """The operands that have a value for each key, not for each token."""
        return frozenset({SEGMENT_IDS[1]})

    def check(self, name: str) -> None:
        """Checks the map and the decay of the term ``name``.

        Raises:
          ValueError: a decay is outside (0, 1], or the map with it is not causal.
        """
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"{name} takes an index map, not {self.map!r}")
        if self.by not in GATES:
            raise ValueError(f"{name}: by={self.by!r} must be one of {GATES}")
        if self.decay is None:
            return
        if not self.kind.causal:
            raise ValueError(
                f"{name}: decay={self.decay!r} with map={self.map!r}: a decay counts "
                "the steps since a key, so the map must be causal: use causal(), "
                "causal() & segments(), or decay=None"
            )
        if isinstance(self.decay, str):
            check_operand_name(f"{name}: decay", self.decay, "None", "numbers")
            return
        if self.by == "channel":
            raise ValueError(
                f"{name}: decay={self.decay!r} with by='channel': log-decays by "
                "channel are an operand: give its name"
            )
        for value in np.ravel(self.decay):
            if not 0 < value <= 1:
                raise ValueError(
                    f"{name}: decay={self.decay!r} must be in (0, 1]: it multiplies "
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
    def operands(self) -> Mapping[str, int]:
        """The segment ids, and the operand of log-decays."""
        found = dict.fromkeys(SEGMENT_IDS, 1) if self.kind.segments else {}
        axes = 3 if self.by == "channel" else 2
        return found | ({self.decay: axes} if isinstance(self.decay, str) else {})

    def reads(self, name: str) -> bool:
        """Whether it reads ``name``: an array, a state, or the dropout key.

        It accepts the dropout key so that ``attend`` can raise a clear error.
        """
        known = (*self.operands, *operands_of(self.map))
        return name in known or name == STATE or is_dropout(name)

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The log-decays of every token, by key head and perhaps by channel."""
        if not isinstance(self.decay, str):
            return {}
        channels = (sizes.head_dim,) if self.by == "channel" else ()
        shape = sizes.num_kv_heads, *channels
        return {self.decay: Learned(shape, per_query=True, squash="log_sigmoid")}


def factors(name: str, decay: Any) -> Decay:
    """A decay as a term keeps it: a number, a tuple of one for each head, a name.

    Raises:
      ValueError: it has more than one axis.
    """
    if decay is None or isinstance(decay, str):
        return decay
    values = np.asarray(decay, np.float64)
    if values.ndim > 1:
        raise ValueError(
            f"{name}: decay={decay!r} must be one number, or one for each head"
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
            f"map={map!r} has no recurrence here: linear and delta take causal(), "
            "full(), segments() or causal() & segments(); or use softmax(map)"
        )
    return found


def _conjuncts(map: IndexMap) -> frozenset[ir.Pred]:
    """The conditions that a map puts on a pair, simplified; equal for equal maps."""
    node = simplify(map.node)
    return frozenset(node.terms if isinstance(node, ir.And) else (node,))
