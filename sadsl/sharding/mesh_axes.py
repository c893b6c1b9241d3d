"""``MeshAxes``: which axes of a mesh the batch, the heads and the sequence are on."""

from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


@dataclass(frozen=True)
class MeshAxes:
    """Names of mesh axes; None leaves an axis of the arrays whole on each device.

    Attributes:
      mesh: the devices.
      batch, heads, sequence: an axis of the mesh each, or several for ``batch``.

    Raises:
      ValueError: the mesh has no such axis, or one axis has two uses.

    Example:
      >>> import jax, sadsl as sa
      >>> mesh = jax.make_mesh((1, 1), ("data", "seq"))
      >>> sa.MeshAxes(mesh, batch="data", sequence="seq").size("seq")
      1
    """

    mesh: Mesh | AbstractMesh
    batch: str | tuple[str, ...] | None = None
    heads: str | None = None
    sequence: str | None = None

    def __post_init__(self) -> None:
        for role in ("batch", "heads", "sequence"):
            for name in _names(getattr(self, role)):
                if name not in self.mesh.axis_names:
                    raise ValueError(
                        f"{role}={name!r} is no axis of the mesh, whose axes are "
                        f"{tuple(self.mesh.axis_names)}: name one of them, or None"
                    )
        used = [*_names(self.batch), *_names(self.heads), *_names(self.sequence)]
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise ValueError(
                f"the mesh axis {twice[0]!r} has two uses among batch={self.batch!r}, "
                f"heads={self.heads!r} and sequence={self.sequence!r}: give each its "
                "own axis"
            )

    def size(self, name: str | tuple[str, ...] | None) -> int:
        """The number of devices along an axis, or along several; 1 for None."""
        found = 1
        for each in _names(name):
            found *= self.mesh.shape[each]
        return found

    def placed(self, x: Array, layout: PartitionSpec) -> Array:
        """``x`` with this layout, on meshes whose arrays have it in their type."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return x
        return jax.sharding.reshard(x, NamedSharding(self.mesh, layout))

    def layout(self) -> PartitionSpec:
        """The layout of ``[batch, seq, heads, dim]``."""
        return PartitionSpec(self.batch, self.sequence, self.heads)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)
