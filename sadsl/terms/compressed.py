"""``compressed``: attention to blocks of positions, each with one key and one value."""

from collections.abc import Mapping
from dataclasses import dataclass

from sadsl.maps.base import IndexMap, at_least
from sadsl.maps.call_text import call_text
from sadsl.maps.named import full, where
from sadsl.maps.operand_names import check_operand_name
from sadsl.terms.base import Term, is_dropout


@dataclass(frozen=True, repr=False)
class Compressed(Term):
    """One softmax over whole blocks before the query; see ``compressed``."""

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
                check_operand_name(f"compressed: {field}", name, "None")

    @property
    def blocks(self) -> IndexMap:
        """The blocks that a query sees: a map from positions to block numbers."""
        if not self.causal:
            return full()
        return where(lambda q, k: k * self.stride + self.length <= q + 1)

    @property
    def of_tokens(self) -> bool:
        """False: its keys are made of tokens."""
        return False

    @property
    def support(self) -> IndexMap:
        """No pair of tokens: its keys are blocks, and others can share its softmax."""
        return ~full()

    @property
    def seen(self) -> IndexMap:
        """The tokens of the blocks that a query sees."""
        length, stride = self.length, self.stride
        inside = where(lambda q, k: k % stride < length)
        if self.causal:
            # Keys before the end of the last block that ends by position q.
            over = where(lambda q, k: k < (q + 1 - length) // stride * stride + length)
            return inside & over & where(lambda q, k: q + 1 >= length)
        whole = where(lambda q, k, h, n: k < (n - length) // stride * stride + length)
        return inside & whole & where(lambda q, k, h, n: n >= length)

    def num_blocks(self, kv_seq_len: int) -> int:
        """The number of whole blocks in a sequence."""
        return max(0, (kv_seq_len - self.length) // self.stride + 1)

    @property
    def operands(self) -> Mapping[str, int]:
        """The compressing functions, which have no axes."""
        return {name: 0 for name in (self.key, self.value) if name is not None}

    def reads(self, name: str) -> bool:
        """Whether ``name`` is a compressing function, or the dropout key."""
        return name in self.operands or is_dropout(name)

    def __repr__(self) -> str:
        return call_text(self)


def compressed(
    length: int = 32,
    stride: int = 16,
    key: str | None = None,
    value: str | None = None,
    causal: bool = True,
) -> Compressed:
    """A softmax over blocks of positions, each compressed to one key and one value.

    Block ``j`` holds the ``length`` positions from ``j * stride`` on, so blocks overlap
    if ``stride < length``. Positions at the end that do not fill a block are left out.
    A query sees the blocks that end at its position or before, so it depends on no
    later token. The first ``length - 1`` queries see no block and yield 0 (Yuan et al.,
    Native sparse attention: hardware-aligned and natively trainable sparse attention,
    2025, section 3.3.1).

    It reads no segment ids: a block may span documents of a packed sequence.

    Args:
      length: positions in a block.
      stride: positions from the start of one block to the start of the next.
      key, value: how the keys and the values of a block become one: their mean if None,
        else the name of a function in ``operands``, from ``[batch, blocks, length,
        num_kv_heads, dim]`` to ``[batch, blocks, num_kv_heads, dim]``. In the paper it
        is a network that knows the positions in a block: ``BlockCompressor`` of the
        layers.
      causal: False: every query sees all blocks.

    Raises:
      ValueError: a size is below 1, or a name is not an identifier.

    Example:
      Which of three blocks of 4 positions each of 8 queries sees:

      >>> import sadsl as sa
      >>> term = sa.compressed(length=4, stride=2)
      >>> term.num_blocks(8)
      3
      >>> print(term.blocks.dense(8, 3)[0].astype(int))
      [[0 0 0]
       [0 0 0]
       [0 0 0]
       [1 0 0]
       [1 0 0]
       [1 1 0]
       [1 1 0]
       [1 1 1]]
    """
    return Compressed(length, stride, key, value, causal)
