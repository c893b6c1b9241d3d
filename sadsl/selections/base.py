"""Defines ``Selection``, a map whose pairs depend on the queries and keys of a call.

A selection has two halves. ``choose`` computes arrays from the content of a call, its
*parts*, such as "block ``c`` is chosen for query ``q``". ``pairs`` is an expression
that reads the parts, like that of any map. The compiler sees only the expression, so
selections compose with every other map, and new content does not recompile.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowering import ir
from lowering.expr.assume import envelope
from lowering.problem import Problem
from lowering.run_time.packed import PackedBools, packed
from pallas_kernels.lists.call import num_blocks
from sadsl.maps.base import IndexMap
from sadsl.maps.call_text import call_text
from sadsl.maps.symbols import OperandArray

# On which later tokens the keys chosen for a query may depend: none, those of the
# query's own block, or all.
Leak = Literal["none", "block", "all"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Content:
    """The arrays of a call from which a selection chooses; no gradient flows to them.

    Attributes:
      q: the queries ``[batch, num_q_heads, q_seq_len, head_dim]``, in the dtype of the
        call.
      k: the keys ``[batch, num_kv_heads, kv_seq_len, head_dim]``, likewise.
      given: the arrays passed as ``operands=``, each with a batch axis in front:
        centroids, gates, projections.
      sm_scale: the factor of the logits.
      q_offset: the position of the first query, if it is known.
      position: the same as an array ``[batch or 1]``; None if it is known.

    Example:
      >>> import numpy as np
      >>> q, k = np.zeros((1, 4, 8, 2)), np.zeros((1, 2, 8, 2))
      >>> Content(q, k, {}, sm_scale=1.0).group
      2
    """

    q: Float[Array, "batch q_heads q head_dim"]
    k: Float[Array, "batch kv_heads kv head_dim"]
    given: Mapping[str, Array]
    sm_scale: Any = field(metadata={"static": True})  # a float, or a traced scalar
    q_offset: int = field(default=0, metadata={"static": True})
    position: Int[Array, " batch_or_1"] | None = None

    @property
    def first(self) -> Any:
        """The position of the first query: an integer, or a traced scalar."""
        return self.q_offset if self.position is None else self.position[0]

    @property
    def group(self) -> int:
        """The number of query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]

    def keys(self) -> Float[Array, "batch q_heads kv head_dim"]:
        """The keys of each query head, float32."""
        return jnp.repeat(self.k.astype(jnp.float32), self.group, axis=1)

    def queries(self) -> Float[Array, "batch q_heads q head_dim"]:
        """The queries, float32."""
        return self.q.astype(jnp.float32)

    def operand(self, name: str, what: str) -> Array:
        """The array passed as ``operands[name]``, ``[batch or 1, ...]``.

        Raises:
          ValueError: it was not passed; ``what`` describes it in the error.
        """
        if name not in self.given:
            raise ValueError(
                f"the map reads {name!r}, {what}, which was not given: pass "
                f"operands={{{name!r}: array}}"
            )
        return self.given[name]


class ListShape(NamedTuple):
    """The shape of a choice as a list of key blocks for each row of queries."""

    size: int  # blocks in a list
    block_q: int  # queries in a row
    block_kv: int  # keys in a block
    scope: str  # "query": a list for each query head; "group"; "shared"

    def groups(self, num_heads: int, num_kv_heads: int) -> int:
        """The number of lists of a row."""
        sizes = {"query": num_heads, "group": num_kv_heads, "shared": 1}
        return sizes[self.scope]

    def rows(self, problem: Problem) -> int:
        """The number of rows."""
        return num_blocks(problem.q_seq_len, self.block_q)


class Selection(IndexMap):
    """A map whose pairs depend on the content of a call; the base class of selections.

    Subclass it as a frozen dataclass. ``choose`` computes the parts from the content,
    and ``pairs`` is an expression of ``self.part(name)``. ``operands`` names the arrays
    that ``choose`` reads, with the number of axes of each without the batch. ``leak``
    says on which later tokens the choice for a query may depend by design.

    ``sadsl.select`` returns the parts of a call; ``dense`` draws them.

    Example:
      >>> import sadsl as sa
      >>> spec = sa.topk(1, block=2)
      >>> spec.key("chosen")
      'topk(1, block=2).chosen'
      >>> chosen = [[[1, 0], [0, 1]]]  # [heads, query blocks, key blocks]
      >>> print(spec.dense(4, operands={spec.key("chosen"): chosen})[0].astype(int))
      [[1 1 0 0]
       [1 1 0 0]
       [0 0 1 1]
       [0 0 1 1]]
    """

    leak: ClassVar[Leak] = "all"

    @property
    def by_position(self) -> bool:
        """Whether it chooses for each query alone, whose position may be traced."""
        return False

    @property
    def by_token(self) -> bool:
        """Whether a part indexed by a query or a key depends on that token alone.

        Or on earlier ones, by ``choose_after``.
        """
        return False

    def choose_after(
        self, content: Content, earlier: Mapping[str, Array], there: Array
    ) -> Mapping[str, Array]:
        """The parts of new tokens, if ``by_token``.

        Args:
          content: of the new tokens alone.
          earlier: the parts of earlier keys, ``[batch or 1, ..., slots]``.
          there: which of the slots hold a key, bool ``[batch or 1, slots]``.
        """
        del earlier, there
        return self.choose(content)

    @property
    def order(self) -> Mapping[str, str]:
        """The parts by which to sort queries and keys, so that the map is block-dense.

        ``{"q": part, "k": part}``, each ``[heads, length]``; empty where sorting gains
        nothing.
        """
        return {}

    @property
    def operands(self) -> Mapping[str, int]:
        """The names of the arrays that ``choose`` reads, with their ranks.

        The rank is the number of axes without the batch.
        """
        return {}

    @property
    def of_keys(self) -> Mapping[str, int]:
        """Those of ``operands`` that have an entry for each key, and that axis.

        The axis does not count the batch.
        """
        return {}

    def choose(self, content: Content) -> Mapping[str, Array]:
        """Computes the parts, by name: integers or bools ``[batch or 1, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(content)")

    def choose_packed(self, content: Content) -> Mapping[str, Array | PackedBools]:
        """As ``choose``, with the part "chosen" packed if it has bools.

        A selection of single keys overrides it: it chooses some rows at a time, and
        packs them before it goes on, so that the bools never exist as a whole.
        """
        return with_packed(self.choose(content), "chosen")

    def list_shape(self, problem: Problem) -> ListShape | None:
        """The shape of its choice as lists; None if a list cannot hold it.

        Then ``pairs`` reads the one part "chosen", perhaps beside conditions that no
        choice changes, and the part "listed" may be given instead: int32 ``[batch or 1,
        groups, rows, size]``, ascending. An entry of the number of all blocks, at the
        end of a list, stands for no block.
        """
        del problem
        return None

    def choose_lists(self, content: Content) -> Int[Array, "batch groups rows size"]:
        """Computes the part "listed"; see ``list_shape``."""
        raise NotImplementedError(f"{type(self).__name__} must define choose_lists")

    def chosen_by(
        self, listed: Int[Array, "batch groups rows size"], problem: Problem
    ) -> Mapping[str, Array]:
        """The other parts, from the part "listed"."""
        raise NotImplementedError(f"{type(self).__name__} must define chosen_by")

    def part(self, name: str) -> OperandArray:
        """A part as an operand that ``pairs`` indexes, as in ``part(name)[h, k]``."""
        return OperandArray(self.key(name))

    def key(self, name: str) -> str:
        """The name under which a part is passed among the operands of a call."""
        return f"{self!r}.{name}"

    def owns(self, key: str) -> bool:
        """Whether an operand of this name is a part of this selection."""
        return key.startswith(f"{self!r}.")


@dataclass(frozen=True, repr=False)
class NamedSelection(Selection):
    """A selection whose repr is a call: ``KeyTopw(5)`` is shown as ``key_topw(5)``.

    Arguments with a default are written with their names.
    """

    def __repr__(self) -> str:
        return call_text(self)


def selections_of(value: Any) -> tuple[Selection, ...]:
    """The selections in a map or a term, each once, in order of appearance."""
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


T = TypeVar("T")


def with_choice(value: T, choice: Selection, new: IndexMap) -> T:
    """A map or a term with ``new`` in place of a selection."""
    if value == choice:
        return new  # type: ignore[return-value]
    if isinstance(value, tuple):
        return type(value)(with_choice(x, choice, new) for x in value)
    if not is_dataclass(value) or isinstance(value, Selection | type):
        return value
    old = {each.name: getattr(value, each.name) for each in fields(value)}
    changed = {name: with_choice(x, choice, new) for name, x in old.items()}
    changed = {name: x for name, x in changed.items() if x is not old[name]}
    return replace(value, **changed) if changed else value


@lru_cache(maxsize=1024)
def operands_of(map: IndexMap) -> Mapping[str, int]:
    """The run-time arrays that a map reads, by name, with their numbers of axes.

    It includes arrays that no expression reads after simplification or ``@``.
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
    """The expression of all pairs that the map can have, whatever is chosen."""
    chosen = selections_of(map)
    if not chosen:
        return map.node
    return envelope(map.node, lambda name: any(s.owns(name) for s in chosen))


def with_packed(
    parts: Mapping[str, Array | PackedBools], name: str
) -> dict[str, Array | PackedBools]:
    """The parts, with the one of this name packed if it has bools."""
    found: dict[str, Array | PackedBools] = dict(parts)
    part = found.get(name)
    if isinstance(part, jax.Array) and part.dtype == bool:
        found[name] = packed(part)
    return found


def by_entry(function: Callable[[Content], T], content: Content) -> T:
    """``function(content)``, entry by entry if each has a position of its own."""
    at = content.position
    if at is None or len(at) == 1:
        return function(content)
    batch = len(content.q)

    def whole(x: Array) -> bool:
        return len(x) == batch

    def of_one(content: Content) -> T:
        alone = jax.tree.map(lambda x, own: x[None] if own else x, content, owned)
        return jax.tree.map(lambda x: x[0], function(alone))

    owned = jax.tree.map(whole, content)
    axes = jax.tree.map(lambda own: 0 if own else None, owned)
    return jax.vmap(of_one, in_axes=(axes,))(content)


def choose(
    chosen: tuple[Selection, ...], content: Content, *, pack: bool = False
) -> dict[str, Any]:
    """Computes the parts of selections, by their keys.

    Parts that ``content.given`` holds already are taken from there. With ``pack``, the
    bools of "chosen" are ``PackedBools``.
    """
    frozen = jax.lax.stop_gradient(content)
    lengths = content.q.shape[2], content.k.shape[2]
    problem = Problem(*lengths, content.q.shape[1], content.q_offset)
    parts: dict[str, Any] = {}
    for selection in chosen:
        given: dict[str, Any] = {
            n: x for n, x in content.given.items() if selection.owns(n)
        }
        listed = given.pop(selection.key("listed"), None)
        made: Mapping[str, Any] = {}
        if not given and listed is not None:
            made = selection.chosen_by(listed, problem)
        elif not given:
            by = selection.choose_packed if pack else selection.choose
            made = by_entry(by, frozen)
        if pack:
            given = with_packed(given, selection.key("chosen"))
            made = with_packed(made, "chosen")
        parts |= given or {selection.key(name): x for name, x in made.items()}
    return parts
