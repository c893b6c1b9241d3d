"""The predicate that kernels call: one hashable object for all maps of a plan."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jax import lax

from lowering import ir
from lowering.expr.evaluate import Jax, evaluate
from lowering.expr.sides import sides_apart


@dataclass(frozen=True)
class KernelPredicate:
    """Tests the pairs of one map on tiles of positions.

    ``maps`` are nodes after hoisting. Maps that differ in constants only (a window for
    each head) become one test, which selects its constants by the map index. Other maps
    become the branches of a ``lax.switch``.
    """

    maps: tuple[ir.Pred, ...]

    def __call__(
        self,
        map_index: Any,
        q_ids: Any,
        k_ids: Any,
        q_vectors: tuple,
        kv_vectors: tuple,
        bits: tuple = (),
    ) -> Any:
        """Bools that broadcast over ``q_ids`` and ``k_ids``: see ``call.Predicate``."""
        vectors, maps = (*q_vectors, *kv_vectors), _apart(self.maps)
        at = Jax(
            q_ids, k_ids, map_index,
            q_vectors=q_vectors, kv_vectors=kv_vectors, bits=bits,
        )  # fmt: skip
        if len(maps) == 1:
            return evaluate(maps[0], at)
        if isinstance(map_index, int):
            return evaluate(maps[map_index], at)
        joined = join(maps)
        if joined is not None:
            return evaluate(joined, at)
        shape = jnp.broadcast_shapes(
            *(jnp.shape(x) for x in (q_ids, k_ids, *vectors, *bits))
        )

        def branch(node: ir.Pred) -> Any:
            # Branches return integers: not every backend can return bool vectors.
            held = lambda: jnp.broadcast_to(evaluate(node, at), shape)
            return lambda: held().astype(jnp.int32)

        return lax.switch(map_index, [branch(node) for node in maps]) != 0


@lru_cache(maxsize=256)
def _apart(maps: tuple[ir.Pred, ...]) -> tuple[ir.Pred, ...]:
    return tuple(map(sides_apart, maps))


@lru_cache(maxsize=256)
def join(maps: tuple[ir.Node, ...]) -> ir.Node | None:
    """One node for maps that differ in constants only, or None.

    A constant that differs becomes a table over ``h``, which is the map index here.
    """
    first = maps[0]
    if all(node == first for node in maps):
        return first
    if any(type(node) is not type(first) for node in maps):
        return None
    if isinstance(first, ir.Const):
        values = tuple(node.value for node in maps if isinstance(node, ir.Const))
        return ir.Table(values, ir.H)
    if isinstance(first, ir.Hoisted | ir.Var | ir.Bool | ir.HoistedBits):
        return None
    below = [tuple(ir.children(node)) for node in maps]
    if len({len(b) for b in below}) > 1:
        return None
    joined = [join(column) for column in zip(*below, strict=True)]
    # What a node holds beside its children (a divisor, a set) must agree.
    bare = {ir.rebuild(node, lambda _: ir.Const(0)) for node in maps}
    if None in joined or len(bare) > 1:
        return None
    return ir.with_children(first, joined)
