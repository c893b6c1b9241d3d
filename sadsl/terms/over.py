"""``over``: a softmax over keys of another source than the tokens of the call."""

from collections.abc import Mapping
from dataclasses import dataclass

from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.named import full
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import Spec, Term


@dataclass(frozen=True, repr=False)
class Over(Term):
    """One softmax over entries; see ``over``."""

    source: str
    map: IndexMap
    values: str | None = None
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        check_operand_name("over: source", self.source)
        if self.values is not None:
            check_operand_name("over: values", self.values, "None")
        if not isinstance(self.map, IndexMap):
            raise TypeError(f"over takes an index map, not {self.map!r}")

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The map of queries and entries."""
        return (self.map,)

    @property
    def operands(self) -> Mapping[str, int]:
        """The entries, and their values."""
        names = (self.source, self.values)
        return {name: 3 for name in names if name is not None}

    @property
    def of_tokens(self) -> bool:
        """False: its keys are made of tokens."""
        return False

    @property
    def support(self) -> IndexMap:
        """No pair of tokens: its keys are entries, and others can share its softmax."""
        return ~full()

    @property
    def seen(self) -> None:
        """Unknown: it depends on the tokens of which the entries are made."""

    def __repr__(self) -> str:
        return call_text(self)


def over(
    source: str,
    map: IndexMap,
    values: str | None = None,
    logits_soft_cap: float | None = None,
) -> Over:
    """A softmax whose keys are the entries of an operand, instead of the call's keys.

    In the map, ``k`` counts entries. In a ``joint`` with other terms there is one
    normaliser over tokens and entries, and one sink. A token that the entries were made
    of is another key than the entry: if a query sees both, both count. DeepSeek-V4
    reads a window of tokens and pooled entries like this (DeepSeek-AI, DeepSeek-V4,
    2026: compressed sparse attention).

    Args:
      source: the operand of the entries, ``[batch or 1, entries, num_kv_heads,
        head_dim]``. Its heads divide those of q; ``entries`` makes them.
      map: which entries a query sees, for example ``where(lambda q, k: k < (q + 1) //
        4)`` for entries of four tokens each. It may have selections.
      values: the operand of their values; None: the entries are their own values.
      logits_soft_cap: as in ``softmax``.

    Raises:
      TypeError: ``map`` is not an index map.
      ValueError: a name is not an identifier.

    Example:
      >>> import sadsl as sa
      >>> whole = sa.where(lambda q, k: k < (q + 1) // 4)
      >>> near = sa.softmax(sa.causal() & sa.window(127), sink=True)
      >>> sa.joint(near, sa.over("entries", whole)).reads("entries")
      True
    """
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    return Over(source, map, values, cap)
