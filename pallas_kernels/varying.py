"""Over which axes of a mesh values differ: what ``shard_map(check_vma=True)`` checks.

Within it, a value either is the same on all devices along an axis or varies along it,
and JAX wants a loop to hand on what it was handed, and a kernel to say what it yields.
Elsewhere nothing varies, and these functions change nothing.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def axes_of(*trees: Any) -> frozenset[str]:
    """The axes along which some leaf varies."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary(tree: Any, *like: Any) -> Any:
    """``tree``, each leaf of which varies at least where a leaf of ``like`` does.

    What a loop starts from is often the same everywhere, and what it adds is not.
    """
    wanted = axes_of(*like)

    def cast(x: Any) -> Any:
        missing = wanted - axes_of(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(cast, tree) if wanted else tree


def alike(tree: Any) -> Any:
    """``tree``, all leaves of which vary along the same axes."""
    return vary(tree, tree)


def shape_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: Any
) -> jax.ShapeDtypeStruct:
    """A result of a kernel, which varies where ``like`` does: an operand of it."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def aval_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.core.ShapedArray
) -> jax.core.ShapedArray:
    """The result of a primitive of ours, which varies where ``like`` does."""
    kind = like.manual_axis_type
    if not kind.varying:
        return jax.core.ShapedArray(shape, dtype)
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=kind)
