"""``reused``: the choice of an earlier layer, taken instead of made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from jaxtyping import Array
from typing_extensions import override

from lowering.problem import Problem
from sadsl.maps.symbols import Symbol, Truth
from sadsl.selections.base import Content, Leak, ListShape, NamedSelection, Selection


@dataclass(frozen=True, repr=False)
class Reused(NamedSelection):
    """A choice that another layer made; see ``reused``."""

    choice: Selection

    def __post_init__(self) -> None:
        if not isinstance(self.choice, Selection):
            raise TypeError(
                f"reused takes a selection such as topk(...), not {self.choice!r}"
            )

    @property
    @override
    def leak(self) -> Leak:  # type: ignore[override]
        return self.choice.leak

    @property
    @override
    def by_position(self) -> bool:
        return self.choice.by_position

    @property
    @override
    def order(self) -> Mapping[str, str]:
        return self.choice.order

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth | bool:
        return self.choice.pairs(q, k, h)

    @override
    def key(self, name: str) -> str:
        return self.choice.key(name)

    @override
    def owns(self, key: str) -> bool:
        return self.choice.owns(key)

    @override
    def list_shape(self, problem: Problem) -> ListShape | None:
        return self.choice.list_shape(problem)

    @override
    def chosen_by(self, listed: Array, problem: Problem) -> Mapping[str, Array]:
        return self.choice.chosen_by(listed, problem)

    @override
    def choose(self, content: Content) -> NoReturn:
        self._refuse()

    @override
    def choose_lists(self, content: Content) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self!r} takes the choice of an earlier layer, which was not given: pass "
            "operands=select(spec, ...) of the layer that makes it"
        )


def reused(choice: Selection) -> Reused:
    """The choice of an earlier layer with the same selection: it is not made again.

    Some models choose in one layer of four, and the others share the choice (GLM-5.2,
    HY-V4). Such a layer has no arrays for scores; pass the choice as an operand.

    Args:
      choice: the selection as the spec of the earlier layer has it.

    Raises:
      TypeError: it is not a selection.

    Example:
      >>> import jax.numpy as jnp
      >>> import sadsl as sa
      >>> q = k = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> best = sa.topk(1, block=1)
      >>> made = sa.select(best, q, k)
      >>> sa.attention(q, k, k, reused(best), operands=made)[0, :, 0, 0].tolist()
      [0.0, 3.0, 3.0, 3.0]
    """
    return Reused(choice)
