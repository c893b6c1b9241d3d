"""``Term``, the base class of all terms, and which operands a spec reads."""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any, Literal, NamedTuple, TypeAlias

from sadsl.maps.base import IndexMap
from sadsl.selections.base import operands_of, selections_of

# The dropout key, a traced scale and a state travel among the run-time arrays of a
# call. No operand of a caller can have these names, which are not identifiers.
DROPOUT = "dropout."
DROPOUT_KEY = f"{DROPOUT}key"
STATE = "linear.state"
TRACED_SCALE = "softmax.scale"


class LayerSizes(NamedTuple):
    """The sizes of a layer on which the shapes of learned arrays depend."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    features: int = 0


class Learned(NamedTuple):
    """An operand that a layer learns, or projects from its input.

    Attributes:
      shape: its axes, beside batch and position.
      start: its initial values.
      per_query: True for a projection of the input of each query, ``[batch, q_seq,
        *shape]``; False for a parameter.
      squash: the function applied to a projection; "log_sigmoid", for log-decays, also
        divides by a temperature of 16.
    """

    shape: tuple[int, ...]
    start: Literal["zeros", "ones", "normal"] = "zeros"
    per_query: bool = False
    squash: Literal["sigmoid", "log_sigmoid"] | None = None


class Term:
    """A scored and normalised part of a spec, or a combination of such parts.

    Terms are frozen, hashable values; ``repr`` is code that builds them again.
    """

    # Whether v may have more heads than k, and q another head_dim than k.
    more_values = False
    own_head_dim = False

    @property
    def parts(self) -> tuple["Spec", ...]:
        """The specs inside this term."""
        return ()

    @property
    def operands(self) -> Mapping[str, int]:
        """The operands that this term itself reads: names and numbers of axes.

        The batch axis does not count, and the operands of parts are not listed.
        """
        return {}

    @property
    def of_tokens(self) -> bool:
        """Whether its keys are tokens of the call: ``support`` has all of its pairs."""
        return all(not isinstance(x, Term) or x.of_tokens for x in self.parts)

    @property
    def support(self) -> IndexMap | None:
        """The pairs that share the one normaliser; None if there are several."""
        return None

    @property
    def seen(self) -> IndexMap | None:
        """All pairs on which the output depends; None if no map describes them."""
        every = [seen(part) for part in self.parts]
        if self.support is not None and self.of_tokens:
            return self.support
        known = [each for each in every if each is not None]
        return reduce(or_, known) if known and len(known) == len(every) else None

    def reads(self, name: str) -> bool:
        """Whether this term or a part of it reads the operand ``name``."""
        return name in self.operands or any(reads(part, name) for part in self.parts)

    def learned(self, sizes: LayerSizes) -> dict[str, Learned]:
        """The operands that a layer should learn, by name."""
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
    """The learned operands of two parts of ``term``; equal ones are shared.

    Raises:
      ValueError: the parts want one name in two shapes.
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
    """All pairs on which the output of a spec depends; None if no map says that."""
    return spec if isinstance(spec, IndexMap) else spec.seen


def reads(spec: Spec, name: str) -> bool:
    """Whether a call with ``spec`` reads the run-time array ``name``."""
    if isinstance(spec, Term):
        return spec.reads(name)
    chosen = selections_of(spec)
    asked = any(name in s.operands or s.owns(name) for s in chosen)
    return asked or name in operands_of(spec) or is_dropout(name)


def is_dropout(name: str) -> bool:
    """Whether this is the dropout key, or says where the weights of a part are."""
    return name.startswith(DROPOUT)


def read_by(spec: Spec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The run-time arrays that ``spec`` reads."""
    return {name: x for name, x in given.items() if reads(spec, name)}
