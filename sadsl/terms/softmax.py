"""``softmax``: one softmax over the pairs of a map, with options."""

from collections.abc import Mapping
from dataclasses import dataclass

from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import LayerSizes, Learned, Spec, Term, together
from sadsl.terms.biases import Bias


@dataclass(frozen=True, repr=False)
class Softmax(Term):
    """One softmax over the keys that ``map`` selects; see ``softmax``."""

    map: IndexMap
    logits_soft_cap: float | None = None
    bias: Bias | None = None
    sink: str | None = None

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
        bias = self.bias
        of_bias = {} if bias is None else {**bias.operands, **bias.integer_operands}
        return {**of_bias, **({} if self.sink is None else {self.sink: 1})}

    @property
    def support(self) -> IndexMap:
        """The map."""
        return self.map

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The arrays of the bias, and a sink for each head, which starts at 0."""
        found = {} if self.bias is None else self.bias.learned(sizes)
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
) -> Softmax:
    """One softmax over the pairs of a map; a bare map means ``softmax(map)``.

    Args:
      map: the pairs that attend.
      logits_soft_cap: replaces each scaled score ``s`` by ``cap * tanh(s / cap)``
        (Gemma Team, Gemma 2, 2024, section 2).
      bias: the bias added to the capped scores: ``alibi()``, ``t5_bias()``, ...
      sink: True adds to each softmax a learned logit that has no value: the floats
        ``[num_q_heads]`` of the operand "sink", or of the name given here (OpenAI,
        gpt-oss, 2025). The lse includes it, so it is finite for every query.

    Raises:
      TypeError: the map or the bias has another type.
      ValueError: the cap is not positive, or the sink is not a name.

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
    return Softmax(map, cap, bias, name)
