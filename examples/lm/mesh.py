"""Devices as a mesh of batch and sequence, and what of a run lies where.

Parameters, optimizer and centroids are on every device. Sequences of a batch are split
over ``batch``, their positions over ``sequence``.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sadsl import MeshAxes

State = TypeVar("State")

BATCH, SEQUENCE = "batch", "sequence"
# All devices split the batch.
DATA_PARALLEL = f"{BATCH}=-1"


def read_sizes(text: str) -> dict[str, int]:
    """The sizes of both axes, by name; an axis that ``text`` leaves out has size 1.

    Raises:
      ValueError: it is not like "batch=2,sequence=4", or there is no such axis.
    """
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
        if found is None:
            raise ValueError(
                f"--mesh={text!r}: {part!r} is not an axis with its size: write, for "
                "example, --mesh=batch=2,sequence=4"
            )
        name, size = found[1], int(found[2])
        if name not in (BATCH, SEQUENCE):
            raise ValueError(
                f"--mesh={text!r}: there is no axis {name!r}: the axes are {BATCH!r}, "
                f"over the sequences of a batch, and {SEQUENCE!r}, over their positions"
            )
        if name in sizes:
            raise ValueError(f"--mesh={text!r}: the axis {name!r} occurs twice")
        if size < 1 and size != -1:
            raise ValueError(
                f"--mesh={text!r}: the size of {name!r} must be at least 1, or -1 for "
                "all devices that the other axis leaves"
            )
        sizes[name] = size
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh={text!r}: only one size can be -1")
    return {BATCH: 1, SEQUENCE: 1, **sizes}


def fitted(text: str, num_devices: int) -> dict[str, int]:
    """The sizes of both axes for a number of devices, all of which are used.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = read_sizes(text)
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if num_devices % known:
            raise ValueError(
                f"--mesh={text!r}: {num_devices} devices do not divide by {known}: "
                "choose a size that divides them, or start more devices"
            )
        return {x: num_devices // known if n == -1 else n for x, n in sizes.items()}
    if known != num_devices:
        raise ValueError(
            f"--mesh={text!r} has {known} devices, and there are {num_devices}: write "
            "-1 for one of the sizes, or, to try it out on virtual CPU devices, pass "
            f"--devices={known}"
        )
    return sizes


def check_lengths(
    sizes: dict[str, int], batch_size: int, accumulate: int, seq_len: int
) -> None:
    """Makes sure that every device gets as much of a batch as the others.

    Raises:
      ValueError: the batch, or a part of it, or the sequence does not divide.
    """
    batch, sequence = sizes[BATCH], sizes[SEQUENCE]
    part = batch_size // accumulate
    if part % batch:
        parts = f" in --accumulate={accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"--batch_size={batch_size}{parts} has {part} sequences at a time, which "
            f"{batch} shards of the axis {BATCH!r} cannot share equally: take "
            f"--batch_size={-(-part // batch) * batch * accumulate}, or a smaller "
            f"{BATCH} in --mesh"
        )
    if seq_len % sequence:
        raise ValueError(
            f"--seq_len={seq_len} does not divide by {sequence} shards of the axis "
            f"{SEQUENCE!r}: take --seq_len={-(-seq_len // sequence) * sequence}, or a "
            f"smaller {SEQUENCE} in --mesh"
        )


@dataclass(frozen=True)
class Devices:
    """The devices of a run, and where its arrays lie; without a mesh, the default one.

    Every process calls the same methods with the same values.
    """

    mesh: Mesh | None = None

    @property
    def axes(self) -> MeshAxes | None:
        """How attention lies on the mesh; None without one."""
        if self.mesh is None:
            return None
        return MeshAxes(self.mesh, batch=BATCH, sequence=SEQUENCE)

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding of what every device has; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    @property
    def by_batch(self) -> NamedSharding | None:
        """The sharding of arrays whose first axis is the batch; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(BATCH))

    def copied(self, state: State) -> State:
        """The same state on every device."""
        return jax.tree.map(self._copied_leaf, state)

    def _copied_leaf(self, leaf: Any) -> jax.Array:
        if self.mesh is None or not jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            return jax.device_put(leaf, self.everywhere)
        # jax puts no keys on the devices of other processes.
        numbers = jax.device_put(jax.random.key_data(leaf), self.everywhere)
        return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))

    def split(self, batch: np.ndarray) -> Any:
        """A batch, of which each device gets its sequences.

        Every process makes the whole batch, which is small, so that the order of the
        data does not depend on the number of processes.
        """
        if self.by_batch is None:
            return batch
        return jax.make_array_from_callback(
            batch.shape, self.by_batch, lambda index: batch[index]
        )

    def each_split(self, parts: jax.Array) -> jax.Array:
        """Parts ``[accumulate, batch, seq + 1]``, each of them split over the batch."""
        return self._constrained(parts, P(None, BATCH))

    def spread(self, tokens: jax.Array) -> jax.Array:
        """Tokens ``[batch, seq]``, split over both axes."""
        return self._constrained(tokens, P(BATCH, SEQUENCE))

    def _constrained(self, x: jax.Array, spec: P) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


ONE_DEVICE = Devices()


def devices_for(text: str, batch_size: int, accumulate: int, seq_len: int) -> Devices:
    """All devices as the mesh that the flags ask for.

    Raises:
      ValueError: the text, the number of devices and the sizes do not fit.
    """
    sizes = fitted(text, jax.device_count())
    check_lengths(sizes, batch_size, accumulate, seq_len)
    axes = tuple(sizes.values()), tuple(sizes)
    return Devices(jax.make_mesh(*axes, axis_types=(AxisType.Auto,) * 2))
