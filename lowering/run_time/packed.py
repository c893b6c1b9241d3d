"""``PackedBools``: run-time bools in an eighth of their memory, 32 in a word.

A choice of single keys has a bool for each query and key. As bools it takes a byte for
each of them, packed it takes a bit, which is also what kernels read.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from pallas_kernels.call import WORD


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBools:
    """Bools ``[..., length]``: entry ``i`` is bit ``i % 32`` of word ``i // 32``.

    Unused bits of the last word are 0.
    """

    # uint32 [..., words]. Any, because jax rebuilds a pytree with placeholders in it.
    words: Any
    length: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the bools."""
        return (*self.words.shape[:-1], self.length)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def bools(self) -> Bool[Array, "*leading length"]:
        """The bools themselves."""
        bits = (self.words[..., None] >> _places(self.ndim)) & jnp.uint32(1)
        flat = bits.reshape(*self.words.shape[:-1], -1)
        return flat[..., : self.length] != 0

    def windows(
        self, first: Int[np.ndarray, " windows"]
    ) -> Int[Array, "*leading windows"]:
        """The 32 entries from each of ``first`` on as int32 words.

        Entries beyond the last one are 0.
        """
        words, number = self.words, self.words.shape[-1]
        if not np.array_equal(first, WORD * np.arange(number)):
            words = jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, 2)])
            whole = np.minimum(first // WORD, number)
            shift = (first % WORD).reshape((1,) * (words.ndim - 1) + first.shape)
            shift = jnp.asarray(shift, jnp.uint32)
            low = words[..., whole] >> shift
            # A shift by 32 is not defined: shift by 1 first.
            high = words[..., whole + 1] << (jnp.uint32(WORD - 1) - shift)
            words = low | (high << jnp.uint32(1))
        return jax.lax.bitcast_convert_type(words, jnp.int32)


def packed(mask: Bool[Array, "*leading length"]) -> PackedBools:
    """Packs bools along the last axis.

    Example:
      >>> import jax.numpy as jnp
      >>> packed(jnp.arange(40)[None] % 33 == 0).words.tolist()
      [[1, 2]]
    """
    return PackedBools(words_of(mask), mask.shape[-1])


def words_of(mask: Bool[Array, "*leading length"]) -> UInt32[Array, "*leading words"]:
    """The words of ``packed``."""
    *leading, length = mask.shape
    spare = [(0, 0)] * len(leading) + [(0, -length % WORD)]
    wide = jnp.pad(mask, spare).reshape(*leading, -(-length // WORD), WORD)
    words = wide.astype(jnp.uint32) << _places(mask.ndim)
    return jnp.sum(words, axis=-1, dtype=jnp.uint32)


def _places(leading: int) -> UInt32[Array, "..."]:
    """The places of a word's bits, behind some axes of size 1."""
    return jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * leading + (WORD,))
