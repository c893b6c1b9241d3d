"""``heads``: different heads run different specs."""

from dataclasses import dataclass
from math import gcd

from lowering import ir
from sadsl.maps.base import IndexMap, at_least, per_head
from sadsl.maps.call_text import call_text
from sadsl.terms.base import LayerSizes, Learned, Spec, Term, seen


@dataclass(frozen=True, repr=False)
class Heads(Term):
    """The first heads have the first spec, the next ones the second, and so on."""

    shares: tuple[tuple[Spec, int], ...]

    def __post_init__(self) -> None:
        if not self.shares:
            raise ValueError("heads(): give at least one (spec, number of heads)")
        for part in self.shares:
            if not isinstance(part, tuple) or len(part) != 2:
                raise TypeError(f"heads takes (spec, number of heads), not {part!r}")
            spec, count = part
            if not isinstance(spec, IndexMap | Term):
                raise TypeError(f"heads takes maps and terms, not {spec!r}")
            at_least("heads", "n", count, 1)

    @property
    def num_heads(self) -> int:
        """The number of heads of all parts together."""
        return sum(count for _, count in self.shares)

    @property
    def parts(self) -> tuple[Spec, ...]:
        """The specs of the parts."""
        return tuple(spec for spec, _ in self.shares)

    @property
    def seen(self) -> IndexMap | None:
        """The pairs of every head; None if the pairs of a part depend on the head."""
        maps = [seen(spec) for spec in self.parts]
        known = [m for m in maps if m is not None and "h" not in ir.axes(m.node)]
        if len(known) < len(maps):
            return None
        unit = gcd(*(count for _, count in self.shares))
        each = zip(known, self.shares, strict=True)
        return per_head(*(m for m, (_, n) in each for _ in range(n // unit)))

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The operands that each part learns, sized for its own heads.

        Raises:
          ValueError: two parts learn an operand of one name.
        """
        found: dict[str, Learned] = {}
        for spec, count in self.shares:
            if not isinstance(spec, Term):
                continue
            group = sizes.num_q_heads // sizes.num_kv_heads
            mine = sizes._replace(num_q_heads=count, num_kv_heads=count // group)
            new = spec.learned(mine)
            twice = sorted(set(found) & set(new))
            if twice:
                raise ValueError(
                    f"{self!r} learns {twice[0]!r} in two parts, whose heads differ: "
                    "give the arrays of one part another name"
                )
            found |= new
        return found

    def __repr__(self) -> str:
        return call_text(self, spread=True)


def heads(*parts: tuple[Spec, int]) -> Heads:
    """Runs different specs on different heads.

    Each part is a call of its own on its heads: within a part, the heads of a map and
    on the axes of an operand count from 0. Each part gets the operands that it reads.

    Args:
      *parts: pairs ``(spec, number of heads)``, for consecutive heads. With grouped
        queries, each number is a multiple of the group.

    Raises:
      TypeError: a part is not such a pair.
      ValueError: there is no part, or a number is below 1.

    Example:
      Heads 0 to 3 run ``causal()``, heads 4 and 5 a window:

      >>> import sadsl as sa
      >>> spec = sa.heads((sa.causal(), 4), (sa.causal() & sa.window(1), 2))
      >>> spec.num_heads
      6
      >>> print(spec.seen.dense(4, num_heads=6)[4].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [0 1 1 0]
       [0 0 1 1]]
    """
    return Heads(parts)
