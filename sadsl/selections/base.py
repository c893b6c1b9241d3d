"""Maps decided by content: an expression of run-time arrays, made from q and k.

A selection has two halves. ``pairs`` is an expression like that of any map, over parts:
run-time arrays such as "block ``c`` is chosen for query ``q``". ``choose`` makes the
parts from the content of a call. The compiler sees the expression alone, so selections
compose with every other map, and one trace serves any content.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowering import ir
from lowering.expr.assume import envelope
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.symbols import OperandArray

# How far the keys chosen for a query may depend on later tokens: not at all, on those
# of the query's own block, or on all.
Leak = Literal["none", "block", "all"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Content:
    """What a selection may look at; no gradient flows through it.

    ``q`` is ``[batch, num_q_heads, q_seq_len, head_dim]`` and ``k`` alike with
    ``num_kv_heads`` and ``kv_seq_len``, in the dtype of the call. ``given`` holds the
    arrays that were passed as ``operands=``, each with a batch axis: centroids, gates,
    projections. ``q_offset`` is the position of the first query.
    """

    q: Float[Array, "batch q_heads q head_dim"]
    k: Float[Array, "batch kv_heads kv head_dim"]
    given: Mapping[str, Array]
    sm_scale: Any = field(metadata={"static": True})  # a float, or a traced scalar
    q_offset: int = field(default=0, metadata={"static": True})

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.q.shape[1] // self.k.shape[1]

    def keys(self) -> Float[Array, "batch q_heads kv head_dim"]:
        """The keys that each query head reads, float32."""
        return jnp.repeat(self.k.astype(jnp.float32), self.group, axis=1)

    def queries(self) -> Float[Array, "batch q_heads q head_dim"]:
        """The queries, float32."""
        return self.q.astype(jnp.float32)

    def operand(self, name: str, what: str) -> Array:
        """The array ``operands[name]``, ``[batch or 1, ...]``.

        Raises:
          ValueError: it was not passed; ``what`` says what it should be.
        """
        if name not in self.given:
            raise ValueError(
                f"the map reads {name!r}, {what}, which was not given: pass "
                f"operands={{{name!r}: array}}"
            )
        return self.given[name]


class Selection(IndexMap):
    """A map decided by content; subclass it as a frozen dataclass.

    ``choose`` makes the parts, ``pairs`` is an expression of ``self.part(name)``.
    ``operands`` are the names of the arrays that ``choose`` reads, with the number of
    axes of each beside the batch, and ``leak`` says whether the choice for a query may
    depend on later tokens by design.
    """

    leak: ClassVar[Leak] = "all"

    @property
    def order(self) -> Mapping[str, str]:
        """Parts ``[heads, length]`` by which sorted queries and keys are block-dense.

        ``{"q": part, "k": part}``, or empty where the given order is as good.
        """
        return {}

    @property
    def operands(self) -> Mapping[str, int]:
        """The arrays that ``choose`` reads from ``Content.given``, with their ranks."""
        return {}

    def choose(self, content: Content) -> Mapping[str, Array]:
        """The parts by name: integers or bools ``[batch or 1, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(content)")

    def part(self, name: str) -> OperandArray:
        """A part of the selection, to be indexed in ``pairs``: ``part(name)[h, k]``."""
        return OperandArray(self.key(name))

    def key(self, name: str) -> str:
        """The name of a part among the operands of a call."""
        return f"{self!r}.{name}"

    def owns(self, key: str) -> bool:
        """Whether an operand of a call is a part of this selection."""
        return key.startswith(f"{self!r}.")


@dataclass(frozen=True, repr=False)
class NamedSelection(Selection):
    """A selection whose repr calls the function of its name: ``KeyTopw``, ``key_topw``.

    Arguments without a default stand by position, others by name.
    """

    def __repr__(self) -> str:
        return call_text(self)


def selections_of(value: Any) -> tuple[Selection, ...]:
    """The selections in a map or a term, each once, in the order they are written."""
    found: dict[Selection, None] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Selection):
            found[item] = None
        elif is_dataclass(item):
            for each in fields(item):
                visit(getattr(item, each.name))
        elif isinstance(item, tuple):
            for part in item:
                visit(part)

    visit(value)
    return tuple(found)


@lru_cache(maxsize=1024)
def operands_of(map: IndexMap) -> Mapping[str, int]:
    """The run-time arrays that a map reads as it is written, with their axes.

    Those that simplification or ``@`` leave without a reader are among them.
    """
    found: dict[str, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, IndexMap):
            for node in ir.walk(item.node):
                if isinstance(node, ir.Operand):
                    found[node.name] = len(node.index)
        if isinstance(item, tuple):
            for part in item:
                visit(part)
        elif is_dataclass(item) and not isinstance(item, Selection):
            for each in fields(item):
                visit(getattr(item, each.name))

    visit(map)
    return found


def widest(map: IndexMap) -> ir.Pred:
    """All pairs that the map may have, whatever its selections choose."""
    chosen = selections_of(map)
    if not chosen:
        return map.node
    return envelope(map.node, lambda name: any(s.owns(name) for s in chosen))


def choose(chosen: tuple[Selection, ...], content: Content) -> dict[str, Array]:
    """The parts of selections, by their keys; those given are not made again."""
    frozen = jax.lax.stop_gradient(content)
    parts: dict[str, Array] = {}
    for selection in chosen:
        given = {n: x for n, x in content.given.items() if selection.owns(n)}
        made = {} if given else selection.choose(frozen)
        parts |= given or {selection.key(name): x for name, x in made.items()}
    return parts
