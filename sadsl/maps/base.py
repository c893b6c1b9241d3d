"""Index maps: which keys a query sees. Frozen values and their algebra."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from jaxtyping import Bool as BoolArray
from jaxtyping import Integer as IntArray
from typing_extensions import override

from lowering import ir
from lowering.expr import evaluate as predicate
from lowering.expr import fits, heads
from lowering.ranges import verify
from lowering.solve import eliminate
from sadsl.maps.call_text import call_text
from sadsl.maps.integers import check_int32
from sadsl.maps.symbols import POSITIONS, Symbol, Truth, truth_node
from sadsl.maps.traced import tracing


class IndexMap:
    """A set of (query, key) pairs, perhaps one set a head.

    Combine maps with ``&`` (both), ``|`` (either), ``-`` (the first but not the
    second), ``~`` (the others), ``@`` (one after the other), ``.T``, ``.lift(block)``
    and ``.permute(order)``. A map is hashable, equal by content, and ``repr`` is code
    that ``parse`` reads back.

    To write your own, subclass it as a frozen dataclass (``@dataclass(frozen=True)``)
    and define ``pairs(q, k, h)`` on symbols.
    """

    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth | bool:
        """The predicate of a pair, built from symbols."""
        raise NotImplementedError(f"{type(self).__name__} must define pairs(q, k, h)")

    @cached_property
    def node(self) -> ir.Pred:
        """The predicate that the compiler works on."""
        with tracing(f"pairs of {type(self).__name__}"):
            return truth_node(self.pairs(*(POSITIONS[name] for name in "qkh")))

    def __and__(self, other: "IndexMap") -> "IndexMap":
        return Both(self, _map(other, "&")) if _is_map(other) else NotImplemented

    def __or__(self, other: "IndexMap") -> "IndexMap":
        return Either(self, _map(other, "|")) if _is_map(other) else NotImplemented

    def __sub__(self, other: "IndexMap") -> "IndexMap":
        return Minus(self, _map(other, "-")) if _is_map(other) else NotImplemented

    def __matmul__(self, other: "IndexMap") -> "IndexMap":
        """Two hops: some position ``j`` of the keys has ``a(q, j)`` and ``b(j, k)``."""
        return Composed(self, _map(other, "@")) if _is_map(other) else NotImplemented

    def __invert__(self) -> "IndexMap":
        return Complement(self)

    @property
    def T(self) -> "IndexMap":
        """Query ``q`` sees key ``k`` iff the original map has ``k`` see ``q``."""
        return Transposed(self)

    def lift(self, block: int) -> "IndexMap":
        """The map holds of the blocks ``(q // block, k // block)``."""
        return Lifted(self, block)

    def permute(self, order: Iterable[int]) -> "IndexMap":
        """The map holds of ``(order[q], order[k])``; ``order`` is a permutation."""
        return Permuted(self, tuple(int(i) for i in order))

    def __bool__(self) -> bool:
        raise TypeError(
            "an index map has no truth value: write `a & b`, `a | b`, `~a` instead of "
            "`and`, `or`, `not`, and compare with `is None` instead of `if map`"
        )

    def __repr__(self) -> str:
        # Of a class of the caller: its constructor, which `parse` does not know.
        count = len(fields(self))  # type: ignore[arg-type]
        return call_text(self, type(self).__name__, by_position=count)

    def dense(
        self,
        q_seq_len: int,
        kv_seq_len: int | None = None,
        num_heads: int = 1,
        *,
        operands: Mapping[str, IntArray[np.ndarray, "..."]] | None = None,
    ) -> BoolArray[np.ndarray, "heads q_seq_len kv_seq_len"]:
        """Every pair, bool ``[num_heads, q_seq_len, kv_seq_len]``; for small sizes.

        Args:
          q_seq_len: number of queries.
          kv_seq_len: number of keys; ``q_seq_len`` if None.
          num_heads: heads; a multiple of what ``per_head`` asks for.
          operands: the run-time arrays that the map reads, without a batch axis.

        Raises:
          ValueError: the map is made for other lengths or numbers of heads.
        """
        kv_seq_len = q_seq_len if kv_seq_len is None else kv_seq_len
        q = np.arange(q_seq_len)[:, None]
        k = np.arange(kv_seq_len)[None, :]
        values = {name: np.asarray(x) for name, x in (operands or {}).items()}
        for name, x in values.items():
            check_int32(name, x)
            values[name] = x.astype(np.int64)
        node = ir.substitute(self.node, {"n": ir.Const(kv_seq_len)})
        nodes = heads.per_head(node, num_heads)
        verify.verify(nodes, q_seq_len, kv_seq_len)
        known = fits.known_of(q_seq_len, kv_seq_len, num_heads)
        nodes = tuple(fits.exact(node, known) for node in nodes)
        rows = [
            predicate.evaluate(node, predicate.NumPy(q, k, head, values))
            for head, node in enumerate(nodes)
        ]
        return np.stack([np.broadcast_to(r, (q_seq_len, kv_seq_len)) for r in rows])

    def picture(self, q_seq_len: int, kv_seq_len: int | None = None) -> str:
        """The pairs of one head as text: queries downwards, ``#`` for a key seen."""
        rows = self.dense(q_seq_len, kv_seq_len)[0]
        return "\n".join("".join("#" if x else "." for x in row) for row in rows)


def _is_map(value: object) -> bool:
    return isinstance(value, IndexMap)


def _map(value: object, what: str) -> IndexMap:
    if isinstance(value, IndexMap):
        return value
    raise TypeError(f"{what} takes index maps, not {value!r}")


def at_least(map_name: str, name: str, value: object, least: int) -> None:
    """Refuses a parameter of a map that is no integer or too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{map_name}: {name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{map_name}: {name}={value} must be at least {least}")


@dataclass(frozen=True, repr=False)
class _Binary(IndexMap):
    """An operator between two maps."""

    a: IndexMap
    b: IndexMap

    @override
    def __repr__(self) -> str:
        # A chain of one operator reads without parentheses from the left.
        left = repr(self.a) if type(self.a) is type(self) else _operand_text(self.a)
        return f"{left} {_OPERATORS[type(self)]} {_operand_text(self.b)}"


@dataclass(frozen=True, repr=False)
class Both(_Binary):
    """``a & b``."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(self.a.node) & Truth(self.b.node)


@dataclass(frozen=True, repr=False)
class Either(_Binary):
    """``a | b``."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(self.a.node) | Truth(self.b.node)


@dataclass(frozen=True, repr=False)
class Minus(_Binary):
    """``a - b``."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(self.a.node) & ~Truth(self.b.node)


@dataclass(frozen=True, repr=False)
class Composed(_Binary):
    """``a @ b``."""

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(eliminate.compose(self.a.node, self.b.node))


_OPERATORS: dict[type, str] = {Both: "&", Either: "|", Minus: "-", Composed: "@"}


def _operand_text(item: IndexMap) -> str:
    return f"({item!r})" if isinstance(item, _Binary) else repr(item)


def _method_text(item: IndexMap) -> str:
    """The map as it stands before a dot."""
    return f"({item!r})" if isinstance(item, _Binary | Complement) else repr(item)


@dataclass(frozen=True, repr=False)
class Complement(IndexMap):
    """``~a``."""

    a: IndexMap

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return ~Truth(self.a.node)

    @override
    def __repr__(self) -> str:
        return f"~{_operand_text(self.a)}"


@dataclass(frozen=True, repr=False)
class Transposed(IndexMap):
    """``a.T``."""

    a: IndexMap

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(ir.transpose(self.a.node))

    @override
    def __repr__(self) -> str:
        return f"{_method_text(self.a)}.T"


@dataclass(frozen=True, repr=False)
class Lifted(IndexMap):
    """``a.lift(block)``."""

    a: IndexMap
    block: int

    def __post_init__(self) -> None:
        at_least("lift", "block", self.block, 1)

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        at_q, at_k = (q // self.block).node, (k // self.block).node
        length = ((Symbol(ir.N) + (self.block - 1)) // self.block).node
        new: dict[ir.Axis, ir.Expr] = {"q": at_q, "k": at_k, "n": length}
        return Truth(ir.substitute(self.a.node, new))

    @override
    def __repr__(self) -> str:
        return f"{_method_text(self.a)}.lift({self.block})"


@dataclass(frozen=True, repr=False)
class Permuted(IndexMap):
    """``a.permute(order)``."""

    a: IndexMap
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            shown = str(self.order[:8])[:-1] + (", …)" if len(self.order) > 8 else ")")
            raise ValueError(
                f"permute: order={shown} with {len(self.order)} entries must hold each "
                f"of 0 to {len(self.order) - 1} exactly once"
            )

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        at_q, at_k = ir.Table(self.order, q.node), ir.Table(self.order, k.node)
        return Truth(ir.substitute(self.a.node, {"q": at_q, "k": at_k}))

    @override
    def __repr__(self) -> str:
        return f"{_method_text(self.a)}.permute({list(self.order)})"


@dataclass(frozen=True, repr=False)
class PerHead(IndexMap):
    """Head (or equal head group) i has the i-th map."""

    maps: tuple[IndexMap, ...]

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(ir.ByHead(tuple(m.node for m in self.maps)))

    @override
    def __repr__(self) -> str:
        return call_text(self, spread=True)


def per_head(*maps: IndexMap) -> PerHead:
    """Head (or equal group of heads) ``i`` has the ``i``-th map.

    With ``n`` maps the number of heads must be a multiple of ``n``.
    """
    if not maps:
        raise ValueError("per_head(): give at least one map")
    return PerHead(tuple(_map(m, "per_head") for m in maps))
