"""Random bits of pairs in every form that ``PairBits`` has, with their pairs."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.call import PairBits


@dataclass(frozen=True, kw_only=True)
class Table:
    """Random bits; ``width`` keys share a bit, and ``shape`` is (batch, heads) or 1.

    ``told`` says the width to the kernels. ``blocks`` key blocks share a plane, and
    ``queries`` neighbours share their words.
    """

    width: int = 1
    shape: tuple[int, int] = (1, 1)
    diagonal: bool = False
    told: bool = True
    blocks: int = 1
    queries: int = 1
    seed: int = 0

    def build(self, q_len, kv_len, block_kv):
        """The ``PairBits``, and their pairs ``[batch or 1, heads or 1, q, kv]``."""
        rng = np.random.default_rng(self.seed)
        build = self.of_differences if self.diagonal else self.of_groups
        words, pairs, bit = build(q_len, kv_len, block_kv, rng)
        words, bit = jnp.asarray(words, jnp.int32), jnp.asarray(bit, jnp.int32)
        told = self.width if self.told else None
        return PairBits(
            words, bit, block_kv, self.diagonal, self.blocks, keys_per_bit=told,
            queries_per_word=self.queries,
        ), pairs  # fmt: skip

    def of_groups(self, q_len, kv_len, block_kv, rng):
        span = block_kv * self.blocks
        num_words = -(-span // self.width // 32)
        shape = (*self.shape, -(-kv_len // span), num_words, -(-q_len // self.queries))
        words = rng.integers(-(2**31), 2**31, shape)
        k = np.arange(kv_len)
        bit = k % span // self.width
        columns = np.repeat(words, self.queries, axis=-1)[..., :q_len]
        columns = columns[:, :, k // span, bit // 32]
        return words, np.moveaxis(columns >> (bit % 32)[:, None] & 1 == 1, 2, 3), bit

    def of_differences(self, q_len, kv_len, block_kv, rng):
        start = (-(-kv_len // block_kv) - 1) * block_kv
        num_words = -(-block_kv // 32)
        before = start + 32 * num_words
        held = rng.integers(0, 2, (*self.shape, before + q_len))
        x = np.arange(q_len + start)
        words = np.zeros((*self.shape, 1, num_words, len(x)), np.int64)
        for w, i in np.ndindex(num_words, 32):
            words[:, :, 0, w] |= held[..., before + x - start - 32 * w - i] << i
        words = words.astype(np.uint32).view(np.int32)
        q, k = np.arange(q_len)[:, None], np.arange(kv_len)[None]
        return words, held[..., before + q - k] == 1, k[0] % block_kv
