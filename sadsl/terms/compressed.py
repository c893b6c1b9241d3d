"""Attention to compressed keys and values: one of each for a block of positions."""

from collections.abc import Mapping
from dataclasses import dataclass

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.named import full, where
from sadsl.terms.base import DROPOUT_KEY, Term, check_name


@dataclass(frozen=True, repr=False)
class Compressed(Term):
    """One softmax over the blocks that are past. See ``compressed``, which makes it."""

    length: int = 32
    stride: int = 16
    key: str | None = None
    value: str | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        at_least("compressed", "length", self.length, 1)
        at_least("compressed", "stride", self.stride, 1)
        for field, name in {"key": self.key, "value": self.value}.items():
            if name is not None:
                check_name("compressed", field, name, "None or ")

    @property
    def blocks(self) -> IndexMap:
        """The blocks that a query sees, as a map whose keys are block numbers."""
        if not self.causal:
            return full()
        return where(lambda q, k: k * self.stride + self.length <= q + 1)

    @property
    def seen(self) -> IndexMap:
        """The tokens of the blocks that a query sees."""
        length, stride = self.length, self.stride
        inside = where(lambda q, k: k % stride < length)
        if self.causal:
            # The end of the last block that is over.
            over = where(lambda q, k: k < (q + 1 - length) // stride * stride + length)
            return inside & over & where(lambda q, k: q + 1 >= length)
        whole = where(lambda q, k, h, n: k < (n - length) // stride * stride + length)
        return inside & whole & where(lambda q, k, h, n: n >= length)

    def num_blocks(self, kv_seq_len: int) -> int:
        """The whole blocks of a sequence."""
        return max(0, (kv_seq_len - self.length) // self.stride + 1)

    @property
    def operands(self) -> Mapping[str, int]:
        """The functions that compress, which have no axes."""
        return {name: 0 for name in (self.key, self.value) if name is not None}

    def reads(self, name: str) -> bool:
        """Whether it is a function that compresses, or what dropout is drawn from."""
        return name in self.operands or name == DROPOUT_KEY

    def __repr__(self) -> str:
        return call_text(self)


def compressed(
    length: int = 32,
    stride: int = 16,
    key: str | None = None,
    value: str | None = None,
    causal: bool = True,
) -> Compressed:
    """A softmax over blocks of positions, each with one key and one value.

    Block ``j`` holds ``length`` positions from ``j * stride`` on, so blocks overlap if
    ``stride < length``; a rest at the end that fills no block is in none. A query sees
    the blocks that end with it or before, so nothing leaks; the first ``length - 1``
    queries see none, and yield 0 (Yuan et al., Native sparse attention:
    hardware-aligned and natively trainable sparse attention, 2025, section 3.3.1).

    It reads no segment ids: blocks span the documents of a packed sequence.

    Args:
      length, stride: positions of a block, and from one block to the next.
      key, value: how keys and values become one, the mean if None; else the name of a
        function in ``operands``, from ``[batch, blocks, length, num_kv_heads, dim]`` to
        ``[batch, blocks, num_kv_heads, dim]`` (in the paper a network that knows the
        positions in a block: the layers' ``BlockCompressor``).
      causal: False: every query sees all blocks.
    """
    return Compressed(length, stride, key, value, causal)
