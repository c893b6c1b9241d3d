"""Marks the mesh axes along which values vary, for ``shard_map(check_vma=True)``.

Inside such a ``shard_map``, a value either is the same on all devices along an axis or
varies along it. JAX requires that the state of a loop keeps its axes, and that a kernel
states the axes of its results. Outside, no value varies and these functions change
nothing.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def axes_of(*trees: Any) -> frozenset[str]:
    """The mesh axes along which at least one leaf varies."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary(tree: Any, *like: Any) -> Any:
    """Casts each leaf of ``tree`` to vary along all axes of ``like``.

    The start of a loop is often the same on all devices, and what it adds is not.
    """
    wanted = axes_of(*like)

    def cast(x: Any) -> Any:
        missing = wanted - axes_of(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, tree) if wanted else tree


def alike(tree: Any) -> Any:
    """Casts all leaves of ``tree`` to vary along the same axes."""
    return vary(tree, tree)


def shape_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: Any
) -> jax.ShapeDtypeStruct:
    """The shape of a kernel result that varies as its operand ``like`` does."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def aval_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.core.ShapedArray
) -> jax.core.ShapedArray:
    """The abstract value of a primitive's result that varies as ``like`` does."""
    kind = like.manual_axis_type
    if not kind.varying:
        return jax.core.ShapedArray(shape, dtype)
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=kind)
