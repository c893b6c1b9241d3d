"""``softmax``: one softmax over the pairs of a map, with options."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lowering.bias.nodes import reads_key
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import LayerSizes, Learned, Spec, Term, together
from sadsl.terms.biases import Bias


def channels(value: slice | tuple[int, int]) -> tuple[int, int]:
    """The first channel of a slice or a pair of integers, and the one after the last.

    Raises:
      TypeError: it is neither.
    """
    ends = (value.start or 0, value.stop) if isinstance(value, slice) else value
    pair = isinstance(ends, tuple) and len(ends) == 2
    known = pair and all(isinstance(end, int | np.integer) for end in ends)
    if not known or (isinstance(value, slice) and value.step not in (None, 1)):
        raise TypeError(
            f"softmax: values={value!r} must be a slice such as slice(0, 512): the "
            "channels of the keys that are the values"
        )
    return int(ends[0]), int(ends[1])


@dataclass(frozen=True, repr=False)
class Softmax(Term):
    """One softmax over the keys that ``map`` selects; see ``softmax``."""

    map: IndexMap
    logits_soft_cap: float | None = None
    bias: Bias | None = None
    sink: str | None = None
    values: tuple[int, int] | None = None
    scale: Bias | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"softmax takes an index map, not {self.map!r}")
        if self.sink is not None:
            check_operand_name("softmax: sink", self.sink, "True", "False")
        if not isinstance(self.bias, Bias | None):
            raise TypeError(
                f"softmax: bias={self.bias!r} must be a bias such as alibi(), or None; "
                "to add an array, use pair_bias(name) and pass it as an operand"
            )
        if self.values is not None and not 0 <= self.values[0] < self.values[1]:
            raise ValueError(
                f"softmax: values={self.values} must start at 0 or later and have at "
                "least one channel"
            )
        if not isinstance(self.scale, Bias | None):
            raise TypeError(
                f"softmax: scale={self.scale!r} must be made by bias(lambda q, k, h: "
                "...), or None; a number is sm_scale= of the call"
            )
        if self.scale is not None and reads_key(self.scale.score(1)):
            raise ValueError(
                f"softmax: scale={self.scale!r} reads the key: it is a factor of the "
                "query, of q and h alone"
            )
        cap = self.logits_soft_cap
        if cap is not None and not cap > 0:
            raise ValueError(
                f"softmax: logits_soft_cap={cap} must be positive, or None"
            )

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The map."""
        return (self.map,)

    @property
    def operands(self) -> Mapping[str, int]:
        """The operands of the bias, and the sinks."""
        found: dict[str, int] = {}
        for part in (self.bias, self.scale):
            if part is not None:
                found |= {**part.operands, **part.integer_operands}
        return {**found, **({} if self.sink is None else {self.sink: 1})}

    @property
    def support(self) -> IndexMap:
        """The map."""
        return self.map

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The arrays of the bias, and a sink for each head, which starts at 0."""
        found = {} if self.bias is None else self.bias.learned(sizes)
        if self.scale is not None:
            found = together(self, found, self.scale.learned(sizes))
        if self.sink is None:
            return found
        return together(self, found, {self.sink: Learned((sizes.num_q_heads,))})

    def __repr__(self) -> str:
        return call_text(self)


def softmax(
    map: IndexMap,
    logits_soft_cap: float | None = None,
    bias: Bias | None = None,
    sink: bool | str = False,
    values: slice | tuple[int, int] | None = None,
    scale: Bias | None = None,
) -> Softmax:
    """One softmax over the pairs of a map; a bare map means ``softmax(map)``.

    Args:
      map: the pairs that attend.
      logits_soft_cap: replaces each scaled score ``s`` by ``cap * tanh(s / cap)``
        (Gemma Team, Gemma 2, 2024, section 2).
      bias: the bias added to the capped scores: ``alibi()``, ``t5_bias()``, ...
      sink: True adds to each softmax a learned logit that has no value: the floats
        ``[num_q_heads]`` of the operand "sink", or of the name given here (OpenAI,
        gpt-oss, 2025). ``[batch or 1, num_q_heads]`` has sinks of each batch entry,
        ``[batch or 1, q_seq, num_q_heads]`` of each query (Inkling-2); two axes are
        never those of queries. The lse includes it, so it is finite for every query.
      values: the channels of the keys that are the values, as in ``slice(0, 512)``;
        the call then takes ``k`` for ``v``, too. Kernels load them once: lists on CPUs
        if they are at least half of the channels, TPUs if the slice starts and stops
        at multiples of 128 (or at the last channel), GPUs if they are the first
        channels and their number is a power of two from 16. Other slices are copied.
      scale: a factor of each query beside ``sm_scale``: ``bias(lambda q, k, h: ...)``
        of ``q`` and ``h``. It multiplies q, rounded to its dtype as in published code,
        before selections and scores read it. That takes one multiplication for each
        channel of a query, which XLA fuses with what makes q. A kernel would multiply
        each score, and each gradient of a score, and selections need the scaled q too.

    Raises:
      TypeError: the map, the bias, the values or the scale have another type.
      ValueError: the cap is not positive, the sink is not a name, or the scale reads
        the key.

    Example:
      >>> import sadsl as sa
      >>> term = sa.softmax(sa.causal(), logits_soft_cap=50.0, sink=True)
      >>> term
      softmax(causal(), logits_soft_cap=50.0, sink='sink')
      >>> term.operands
      {'sink': 1}
      >>> sa.plan(term, 256).num_pairs  # the same pairs as those of the bare map
      32896
    """
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    name = ("sink" if sink else None) if isinstance(sink, bool) else sink
    part = None if values is None else channels(values)
    return Softmax(map, cap, bias, name, part, scale)
