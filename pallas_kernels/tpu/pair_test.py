"""Tests the pairs of a partial tile in a TPU kernel."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bits, softmax
from pallas_kernels.block_mask import Axis
from pallas_kernels.call import Call, Vectors
from pallas_kernels.tpu import bit_tiles, bit_words, operands, packed_test
from pallas_kernels.tpu.bit_tiles import BitForm
from pallas_kernels.tpu.operands import SideOperands
from pallas_kernels.tpu.packed_test import Packed, Position
from pallas_kernels.tpu.runs import TpuSizes
from pallas_kernels.tpu.walk import Step


@dataclass(frozen=True)
class PairTest:
    """The function that tests the pairs of a partial tile.

    Tiles are ``[queries, keys]`` if ``by == "q"`` and ``[keys, queries]`` if "kv".
    """

    call: Call
    sizes: TpuSizes
    by: Axis
    forms: tuple[BitForm, ...]  # of each of Vectors.bits
    num_vectors: tuple[int, int]  # of queries and of keys

    def __call__(
        self,
        step: Step,
        block: Any,
        sides: tuple[SideOperands, SideOperands],
        words: tuple,
    ) -> jax.Array:
        """The allowed pairs of the tile, bool.

        ``sides`` are the values of the queries and of the keys, and ``words`` are refs,
        one for each of ``Vectors.bits``.
        """
        by, sizes = self.by, self.sizes
        row_size, size = sizes.block_q, sizes.block_kv
        if by == "kv":
            row_size, size = size, row_size
        q_side, kv_side = sides
        vectors = q_side.vectors, kv_side.vectors
        columns = operands.row_ids(block, size)
        if not words:
            rows = operands.column_ids(step.row, row_size)
            ids = (rows, columns) if by == "q" else (columns, rows)
            return self.asked(step.test, *ids, *vectors, ())
        packing = bit_words.rows_of(by, sizes)
        position = Position(1, step.row * row_size)
        ids = (position, columns) if by == "q" else (columns, position)
        held = tuple(
            self.held(ref[...], numbers, form, step.row if by == "kv" else block)
            for ref, numbers, form in zip(words, kv_side.bits, self.forms, strict=True)
        )
        args = (step.test, *ids, *vectors, held)
        return packed_test.evaluate(lambda x: self.asked(*x), (args,), packing)

    def masked(
        self, s: jax.Array, allowed: jax.Array | None, careful: bool
    ) -> jax.Array:
        """``s`` with ``-inf`` where ``allowed`` is false; None allows all.

        A test of several comparisons is ready long before its score. The chip keeps
        bools of a register in few places, and moving them is dear, so a bound for each
        score waits instead: a partial tile of ``causal() & segments()`` then has 9 %
        fewer bundles (512 x 512, v6e). A score that is not a number stays one, which
        ``careful`` does not allow.
        """
        if allowed is None or careful or not self.several:
            return softmax.mask(s, allowed)
        return jnp.minimum(s, jnp.where(allowed, jnp.inf, softmax.MASKED))

    @cached_property
    def several(self) -> bool:
        """Whether the predicate joins comparisons and reads no bits."""
        if self.forms:
            return False
        args = (np.int32(0), *(np.zeros((1, 1), np.int32),) * 2)
        sides = ((np.zeros((1, 1), np.int32),) * n for n in self.num_vectors)
        jaxpr = jax.make_jaxpr(self.call.predicate)(*args, *sides, ())
        return any(x.primitive.name in ("and", "or") for x in jaxpr.jaxpr.eqns)

    def held(self, words: Any, numbers: Any, form: BitForm, key_block: Any) -> Any:
        """The bits of one of ``Vectors.bits``: ``Packed``, or a bool tile."""
        if self.by == "q":
            spread = words if numbers is None else bit_tiles.on_lanes(words, numbers)
            return Packed(spread)
        if form.spreads:
            return Packed(bit_tiles.words_of_keys(words, key_block, form))
        rows = [words[w : w + 1] for w in range(words.shape[0])]
        return bits.tile(rows, numbers)

    def asked(
        self, test: Any, q_ids: Any, k_ids: Any, q: tuple, kv: tuple, held: tuple
    ) -> Any:
        """The predicate, and that both positions exist."""
        sizes = self.sizes
        pairs = self.call.predicate(test, q_ids, k_ids, q, kv, held)
        if sizes.kv_seq_len % sizes.block_kv:
            pairs &= k_ids < sizes.kv_seq_len
        if sizes.q_seq_len % sizes.block_q:
            # A key that only padded queries see counts as not seen.
            pairs &= q_ids < sizes.q_seq_len
        return pairs


def pair_test(vectors: Vectors, call: Call, sizes: TpuSizes, by: Axis) -> PairTest:
    """The ``PairTest`` of a kernel with rows ``by`` "q" or "kv"."""
    forms = tuple(bit_tiles.form_of(x) for x in vectors.bits)
    num_vectors = len(vectors.q), len(vectors.kv)
    return PairTest(call, sizes, by, forms, num_vectors)
