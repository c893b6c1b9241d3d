"""What every term has, and how a call hands its parts on."""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any, Literal, NamedTuple, TypeAlias

from sadsl.maps.base import IndexMap
from sadsl.selections.base import operands_of, selections_of

# What dropout is drawn from travels as a run-time array; no operand has such a name.
DROPOUT_KEY = "dropout.key"
# And a factor of the scores that is traced.
TRACED_SCALE = "softmax.scale"


class LayerSizes(NamedTuple):
    """The sizes of a layer, as far as learned arrays depend on them."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    features: int = 0


class Learned(NamedTuple):
    """An array that a layer learns, or makes of its input: one a query, if so said.

    A ``per_query`` array is ``[batch, q_seq, *shape]``, squashed as ``squash`` names:
    "log_sigmoid", for log-decays, also divides by a temperature of 16.
    """

    shape: tuple[int, ...]
    start: Literal["zeros", "ones", "normal"] = "zeros"
    per_query: bool = False
    squash: Literal["sigmoid", "log_sigmoid"] | None = None


class Term:
    """A scored and normalised part of a spec, or a combination of such parts.

    Terms are frozen, hashable values; ``repr`` is code that builds them again.
    """

    @property
    def parts(self) -> tuple["Spec", ...]:
        """The specs that it is made of."""
        return ()

    @property
    def operands(self) -> Mapping[str, int]:
        """The axes, but for the batch, of the run-time arrays that it reads itself."""
        return {}

    @property
    def support(self) -> IndexMap | None:
        """The pairs that share one normaliser; None where there are several."""
        return None

    @property
    def seen(self) -> IndexMap | None:
        """All pairs on which the output depends; None where no map says that."""
        if self.support is not None:
            return self.support
        every = [seen(part) for part in self.parts]
        known = [each for each in every if each is not None]
        return reduce(or_, known) if known and len(known) == len(every) else None

    def reads(self, name: str) -> bool:
        """Whether a call with this term takes the run-time array ``name``."""
        return name in self.operands or any(reads(part, name) for part in self.parts)

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The arrays that a layer should learn, by the name of the operand."""
        found: dict[str, Learned] = {}
        for part in self.parts:
            if isinstance(part, Term):
                found = together(self, found, part.learned(sizes))
        return found

    def __bool__(self) -> bool:
        raise TypeError(
            "a term has no truth value: write joint(a, b) or average(a, b) instead of "
            "`a or b`, and compare with `is None` instead of `if term`"
        )


def together(
    term: Term, a: Mapping[str, Learned], b: Mapping[str, Learned]
) -> dict[str, Learned]:
    """What two parts of ``term`` learn; an array that both read is one array.

    Raises:
      ValueError: they want it in two shapes.
    """
    for name in sorted(set(a) & set(b)):
        if a[name] != b[name]:
            raise ValueError(
                f"{term!r} learns {name!r} twice, of shapes {a[name].shape} and "
                f"{b[name].shape}: give one of the two another name"
            )
    return {**a, **b}


Spec: TypeAlias = IndexMap | Term


def seen(spec: Spec) -> IndexMap | None:
    """All pairs on which the output of a spec depends, if a map says that."""
    return spec if isinstance(spec, IndexMap) else spec.seen


def reads(spec: Spec, name: str) -> bool:
    """Whether a call with ``spec`` takes the run-time array ``name``."""
    if isinstance(spec, Term):
        return spec.reads(name)
    chosen = selections_of(spec)
    asked = any(name in s.operands or s.owns(name) for s in chosen)
    return asked or name in operands_of(spec) or name == DROPOUT_KEY


def read_by(spec: Spec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The run-time arrays that ``spec`` reads."""
    return {name: x for name, x in given.items() if reads(spec, name)}
