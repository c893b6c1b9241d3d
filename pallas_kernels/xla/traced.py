"""Lists from traced runs: of fixed shape, by the static capacities of the mask."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.xla.lists import Chunks, Long, Walk


def traced_walk(mask: BlockMask, slots: int) -> Walk:
    """The rows of every map, all of them in chunks of ``slots`` blocks.

    Every array has the maps as its first axis.
    """
    if not mask.max_blocks:
        return Walk((), None)
    rows = jnp.arange(mask.num_rows, dtype=jnp.int32)

    def walk(index: jax.Array) -> Walk:
        at = rows + index * mask.num_rows
        full, partial = (_chunks(mask, at, slots, full=x) for x in (True, False))
        return Walk((), Long(rows, full, partial))

    return jax.vmap(walk)(jnp.arange(mask.num_maps, dtype=jnp.int32))


def _chunks(mask: BlockMask, rows: jax.Array, slots: int, *, full: bool) -> Chunks:
    """The blocks of one kind of ``rows``, in as many chunks as the capacity needs."""
    ptr, start, stop, kind = (
        jnp.asarray(x)
        for x in (mask.row_ptr, mask.run_start, mask.run_stop, mask.run_full)
    )
    per_row = -(-mask.max_blocks // slots)
    run = ptr[rows][:, None] + jnp.arange(mask.max_runs, dtype=jnp.int32)[None, :]
    inside = run < ptr[rows + 1][:, None]
    run = jnp.where(inside, run, 0)
    length = jnp.where(inside & ((kind[run] != 0) == full), (stop - start)[run], 0)
    end = jnp.cumsum(length, axis=1, dtype=jnp.int32)
    count = end[:, -1]

    slot = jnp.arange(per_row * slots, dtype=jnp.int32)[None, :]
    slot = jnp.clip(slot, 0, jnp.maximum(count - 1, 0)[:, None])
    # The run that holds a slot is the first whose end lies beyond it.
    holder = jax.vmap(lambda e, s: jnp.searchsorted(e, s, side="right"))(end, slot)
    holder = jnp.minimum(holder, mask.max_runs - 1)

    def of_holder(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, holder, axis=1)

    block = of_holder(start[run]) + slot - of_holder(end - length)
    begin = jnp.arange(len(rows), dtype=jnp.int32) * per_row
    chunk = jnp.arange(per_row, dtype=jnp.int32) * slots
    real = jnp.clip(count[:, None] - chunk[None, :], 0, slots)
    return Chunks(
        block.reshape(-1, slots).astype(jnp.int32),
        real.reshape(-1).astype(jnp.int32),
        begin,
        (begin + -(-count // slots)).astype(jnp.int32),
    )
