"""Defines ``IndexMap``, which says which keys a query sees, and its operators."""

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
    """A set of pairs: a query sees a key iff the map has the pair. It may vary by head.

    Combine maps with ``&`` (both), ``|`` (either), ``-`` (the first but not the
    second), ``~`` (the pairs that it has not), ``@`` (two hops), ``.T`` (transpose),
    ``.lift(block)`` and ``.permute(order)``. A map is immutable and hashable; two maps
    are equal if their contents are. ``repr`` is code that ``sadsl.parse`` reads back.

    To write your own, subclass it as a frozen dataclass (``@dataclass(frozen=True)``)
    and define ``pairs(q, k, h)``, which is called once, on symbols.

    Example:
      >>> import sadsl as sa
      >>> spec = sa.causal() & (sa.window(1) | sa.sinks(1))
      >>> spec
      causal() & (window(1) | sinks(1))
      >>> print(spec.picture(4))
      #...
      ##..
      ###.
      #.##

      >>> from dataclasses import dataclass
      >>> @dataclass(frozen=True)
      ... class EveryOther(sa.IndexMap):
      ...     first: int
      ...     def pairs(self, q, k, h):
      ...         return (k - self.first) % 2 == 0
      >>> print(EveryOther(first=1).picture(2, 6))
      .#.#.#
      .#.#.#
    """

    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth | bool:
        """The condition under which head ``h`` of query ``q`` sees key ``k``.

        It is built from symbols by comparisons and ``&``, ``|``, ``~``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pairs(q, k, h)")

    @cached_property
    def node(self) -> ir.Pred:
        """The condition of ``pairs`` as an expression of the compiler."""
        with tracing(f"pairs of {type(self).__name__}"):
            return truth_node(self.pairs(*(POSITIONS[name] for name in "qkh")))

    def __and__(self, other: "IndexMap") -> "IndexMap":
        return Both(self, other) if isinstance(other, IndexMap) else NotImplemented

    def __or__(self, other: "IndexMap") -> "IndexMap":
        return Either(self, other) if isinstance(other, IndexMap) else NotImplemented

    def __sub__(self, other: "IndexMap") -> "IndexMap":
        return Minus(self, other) if isinstance(other, IndexMap) else NotImplemented

    def __matmul__(self, other: "IndexMap") -> "IndexMap":
        """Two hops: ``q`` sees ``k`` iff some ``j`` has ``a(q, j)`` and ``b(j, k)``.

        ``j`` is one of the positions of the keys. Using the result raises
        ``NotImplementedError`` where ``j`` cannot be eliminated exactly.

        Example:
          >>> import sadsl as sa
          >>> print((sa.window(1) @ sa.window(1)).picture(4))
          #...
          ##..
          ###.
          .###
        """
        return Composed(self, other) if isinstance(other, IndexMap) else NotImplemented

    def __invert__(self) -> "IndexMap":
        return Complement(self)

    @property
    def T(self) -> "IndexMap":
        """The transpose: ``q`` sees ``k`` iff ``k`` sees ``q`` in this map.

        Example:
          >>> import sadsl as sa
          >>> print(sa.causal().T.picture(3))
          ###
          .##
          ..#
        """
        return Transposed(self)

    def lift(self, block: int) -> "IndexMap":
        """The map of blocks: ``q`` sees ``k`` iff the map has their block numbers.

        The block number of a position is ``position // block``.

        Args:
          block: positions in a block, at least 1.

        Example:
          >>> import sadsl as sa
          >>> print(sa.causal().lift(2).picture(4))
          ##..
          ##..
          ####
          ####
        """
        return Lifted(self, block)

    def permute(self, order: Iterable[int]) -> "IndexMap":
        """The map renumbered: ``q`` sees ``k`` iff it has ``(order[q], order[k])``.

        Args:
          order: a permutation of all positions, ``0`` to ``length - 1``.

        Raises:
          ValueError: ``order`` is not a permutation.

        Example:
          >>> import sadsl as sa
          >>> print(sa.causal().permute([2, 0, 1]).picture(3))
          ###
          .#.
          .##
        """
        return Permuted(self, tuple(int(i) for i in order))

    def __bool__(self) -> bool:
        raise TypeError(
            "an index map has no truth value: write `a & b`, `a | b`, `~a` instead of "
            "`and`, `or`, `not`, and compare with `is None` instead of `if map`"
        )

    def __repr__(self) -> str:
        # A class of the caller's shows its constructor, which `parse` does not know.
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
        """The map as a boolean array ``[num_heads, q_seq_len, kv_seq_len]``.

        It takes a byte for every pair, so it is for small sizes.

        Args:
          q_seq_len: number of queries.
          kv_seq_len: number of keys; ``q_seq_len`` if None.
          num_heads: number of heads; a multiple of the number of maps in ``per_head``.
          operands: the run-time arrays that the map reads, without a batch axis.

        Raises:
          ValueError: the map does not fit these lengths or this number of heads.

        Example:
          >>> import sadsl as sa
          >>> print(sa.causal().dense(3)[0].astype(int))
          [[1 0 0]
           [1 1 0]
           [1 1 1]]
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
        """The map of one head as text: a row a query, ``#`` where it sees the key."""
        rows = self.dense(q_seq_len, kv_seq_len)[0]
        return "\n".join("".join("#" if x else "." for x in row) for row in rows)


def at_least(map_name: str, name: str, value: object, least: int) -> None:
    """Raises an error unless a parameter is an integer of at least ``least``."""
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
        # `(a & b) & c` needs no parentheses: Python groups it from the left.
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
    """The text of a map next to an operator."""
    return f"({item!r})" if isinstance(item, _Binary) else repr(item)


def _method_text(item: IndexMap) -> str:
    """The text of a map whose attribute or method follows."""
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
        order = ir.TableEntries(self.order)  # one object for both
        at_q, at_k = ir.Table(order, q.node), ir.Table(order, k.node)
        return Truth(ir.substitute(self.a.node, {"q": at_q, "k": at_k}))

    @override
    def __repr__(self) -> str:
        return f"{_method_text(self.a)}.permute({list(self.order)})"


@dataclass(frozen=True, repr=False)
class PerHead(IndexMap):
    """Each head, or each of equal groups of heads, has its own map."""

    maps: tuple[IndexMap, ...]

    @override
    def pairs(self, q: Symbol, k: Symbol, h: Symbol) -> Truth:
        return Truth(ir.ByHead(tuple(m.node for m in self.maps)))

    @override
    def __repr__(self) -> str:
        return call_text(self, spread=True)


def per_head(*maps: IndexMap) -> PerHead:
    """Gives heads their own maps: the ``i``-th group of heads uses the ``i``-th map.

    Args:
      *maps: one map for each group of heads. Groups are of equal size, so the number
        of heads must be a multiple of the number of maps.

    Raises:
      ValueError: no map is given.
      TypeError: an argument is not an index map.

    Example:
      >>> import sadsl as sa
      >>> maps = sa.per_head(sa.causal(), sa.full())
      >>> maps
      per_head(causal(), full())
      >>> maps.dense(2, num_heads=4).sum(axis=(1, 2)).tolist()  # pairs of each head
      [3, 3, 4, 4]
    """
    if not maps:
        raise ValueError("per_head(): give at least one map")
    for item in maps:
        if not isinstance(item, IndexMap):
            raise TypeError(
                f"per_head takes index maps, not {item!r}: give maps such as causal()"
            )
    return PerHead(maps)
