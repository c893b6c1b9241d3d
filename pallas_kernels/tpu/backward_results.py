"""The sums of the backward kernel in VMEM, and their way to HBM."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.segments import BackwardPlan, QuerySegments


class DqScratch(NamedTuple):
    """dq of a segment of queries."""

    sums: Any  # f32 [members, blocks, head_dim, block_q]
    stage: Any  # [2, head_dim, block_q], in the dtype of the result
    semaphores: Any


class KeyScratch(NamedTuple):
    """dk and dv of a key block."""

    sums: tuple  # f32 [dim, block_kv]
    stages: tuple  # [dim, block_kv], in the dtypes of the results
    pending: Any  # int32 [1]: 1 while the stages are copied to HBM
    semaphores: Any


def dq_scratch(dq: jax.ShapeDtypeStruct, plan: BackwardPlan) -> DqScratch:
    """The scratch shapes for the result ``dq [heads, head_dim, q]``."""
    parts, block = plan.segments, plan.sizes.block_q
    tile = dq.shape[1], block
    return DqScratch(
        pltpu.VMEM((parts.members, parts.blocks, *tile), jnp.float32),
        pltpu.VMEM((2, *tile), dq.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    )


def key_scratch(
    of_keys: Sequence[jax.ShapeDtypeStruct], plan: BackwardPlan
) -> KeyScratch:
    """The scratch shapes for the results ``[key heads, dim, kv]``."""
    block = plan.sizes.block_kv
    return KeyScratch(
        tuple(pltpu.VMEM((x.shape[1], block), jnp.float32) for x in of_keys),
        tuple(pltpu.VMEM((x.shape[1], block), x.dtype) for x in of_keys),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((len(of_keys),)),
    )


class Dq(NamedTuple):
    """dq of one query head in a segment."""

    scratch: DqScratch
    segments: QuerySegments
    scale: float
    segment: Any  # of the query head
    part: Any  # index of the query head in the segment

    @property
    def first_block(self) -> Any:
        """The first query block of the segment."""
        return self.segment * self.segments.blocks

    def of_block(self, block: Any) -> Any:
        """The ref of the sum of a query block, f32 ``[head_dim, block_q]``."""
        return self.scratch.sums.at[self.part, block - self.first_block]

    def open(self) -> None:
        """Sets the sums to zero."""
        shape = self.scratch.sums.shape[1:]
        self.scratch.sums[self.part] = jnp.zeros(shape, jnp.float32)

    def close(self, out: Any) -> None:
        """Writes the sums to ``out [head_dim, q]``, and waits until they are there."""
        _, stage, semaphores = self.scratch
        width = stage.shape[2]

        def copy(i: Any, slot: Any) -> Any:
            start = (self.first_block + i) * width
            here = pl.ds(pl.multiple_of(start, width), width)
            return pltpu.make_async_copy(
                stage.at[slot], out.at[:, here], semaphores.at[slot]
            )

        def write(i: Any, slot: Any) -> Any:
            @pl.when(i >= 2)
            def _() -> None:
                copy(i - 2, slot).wait()

            found = self.scratch.sums[self.part, i] * self.scale
            stage[slot] = found.astype(stage.dtype)
            copy(i, slot).start()
            return 1 - slot

        count = self.segments.blocks
        slot = lax.fori_loop(jnp.int32(0), jnp.int32(count), write, jnp.int32(0))
        for i in range(max(0, count - 2), count):
            slot = jnp.int32(i % 2)
            copy(jnp.int32(i), slot).wait()


class OfKeys(NamedTuple):
    """dk and dv of one key block.

    With ``several`` segments, the results are sums over rows, in f32 and not scaled.
    """

    scratch: KeyScratch
    outs: tuple  # refs [key heads, dim, kv]
    scales: tuple[float, ...]
    several: bool
    head: Any
    column: Any  # key block

    def open(self, row: Any, adds: Any) -> None:
        """Sets the sums to zero and fetches what earlier rows have added up."""
        pending = self.scratch.pending

        @pl.when(row == 0)
        def _() -> None:
            pending[0] = jnp.int32(0)

        for ref in self.scratch.sums:
            ref[...] = jnp.zeros_like(ref)
        if self.several:

            @pl.when(adds)
            def _() -> None:
                # The row before may have the same key block.
                self.wait()
                for copy in self._copies(read=True):
                    copy.start()

    def close(self, adds: Any) -> None:
        """Starts to write the sums."""
        sums, stages, pending, _ = self.scratch
        if self.several:

            @pl.when(adds)
            def _() -> None:
                for copy in self._copies(read=True):
                    copy.wait()
                for total, stage in zip(sums, stages, strict=True):
                    total[...] += stage[...]

        self.wait()
        for total, stage, scale in zip(sums, stages, self.scales, strict=True):
            found = total[...] if self.several else total[...] * scale
            stage[...] = found.astype(stage.dtype)
        for copy in self._copies(read=False):
            copy.start()
        pending[0] = jnp.int32(1)

    def wait(self) -> None:
        """Waits until the sums of an earlier row are written."""
        pending = self.scratch.pending

        @pl.when(pending[0] == 1)
        def _() -> None:
            for copy in self._copies(read=False):
                copy.wait()
            pending[0] = jnp.int32(0)

    def _copies(self, *, read: bool) -> list:
        width = self.scratch.stages[0].shape[1]
        here = pl.ds(pl.multiple_of(self.column * width, width), width)
        copies = []
        for i, (out, stage) in enumerate(
            zip(self.outs, self.scratch.stages, strict=True)
        ):
            ends = out.at[self.head, :, here], stage
            source, target = ends if read else ends[::-1]
            semaphore = self.scratch.semaphores.at[jnp.int32(i)]
            copies.append(pltpu.make_async_copy(source, target, semaphore))
        return copies
