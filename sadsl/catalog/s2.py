"""S2-Attention: a local band, and strided blocks whose phase differs by head."""

from sadsl.maps.base import IndexMap, at_least, per_head
from sadsl.maps.named import causal, where, window


def s2_attention(
    num_kv_heads: int = 8,
    block: int = 64,
    local: int = 16,
    v: int = 8,
    *,
    offset: int = 0,
    homo_head: bool = False,
    num_dense_heads: int = 0,
) -> IndexMap:
    """A query sees its ``local`` nearest blocks, and every ``v``-th block before.

    Head ``h`` keeps the blocks ``J`` with ``(J + h * step + offset) % v == 0``, where
    ``step`` is ``max(1, v // num_kv_heads)``: ``v`` heads or more cover every block
    together. Query heads of a group share the phase of their KV head.

    Lin et al., S2-Attention: hardware-aware context sharding among attention heads,
    2024. The formula is that of its public kernel library, the defaults are those of
    Phi-3-small (every second layer of which is dense).

    Args:
      num_kv_heads: key heads, each with a phase of its own.
      block: tokens in a block.
      local: nearest blocks; the own block counts.
      v: blocks between the strided blocks.
      offset: added to every phase, in blocks.
      homo_head: gives all heads the phase ``offset``.
      num_dense_heads: last key heads that are plainly causal.

    Example:
      >>> from sadsl import catalog
      >>> spec = catalog.s2_attention(2, 1, local=2, v=4)
      >>> print(spec.dense(8, num_heads=2)[1].astype(int))
      [[1 0 0 0 0 0 0 0]
       [1 1 0 0 0 0 0 0]
       [0 1 1 0 0 0 0 0]
       [0 0 1 1 0 0 0 0]
       [0 0 1 1 1 0 0 0]
       [0 0 1 0 1 1 0 0]
       [0 0 1 0 0 1 1 0]
       [0 0 1 0 0 0 1 1]]
    """
    at_least("s2_attention", "local", local, 1)
    step = 0 if homo_head else max(1, v // num_kv_heads)

    def head(h: int) -> IndexMap:
        verticals = where(lambda q, k: (k + (h * step + offset)) % v == 0)
        return causal() & (window(local - 1) | verticals).lift(block)

    sparse = [head(h) for h in range(num_kv_heads - num_dense_heads)]
    return per_head(*sparse, *[causal()] * num_dense_heads)


def s2_bidirectional(
    local_left: int = 16, local_right: int = 16, v: int = 8, block: int = 64
) -> IndexMap:
    """A query sees near blocks on both sides, and every ``v``-th block beyond them.

    Blocks beyond the band are numbered from 1 on either side; those divisible by ``v``
    are kept. All heads are alike. The library and the defaults are those of
    ``s2_attention`` (Lin et al., 2024).

    Args:
      local_left, local_right: nearest blocks on each side; the own block counts in
        both.
      v: blocks between the kept blocks.
      block: tokens in a block.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.s2_bidirectional(1, 1, v=3, block=1).dense(8)[0].astype(int))
      [[1 0 0 1 0 0 1 0]
       [0 1 0 0 1 0 0 1]
       [0 0 1 0 0 1 0 0]
       [1 0 0 1 0 0 1 0]
       [0 1 0 0 1 0 0 1]
       [0 0 1 0 0 1 0 0]
       [1 0 0 1 0 0 1 0]
       [0 1 0 0 1 0 0 1]]
    """
    at_least("s2_bidirectional", "local_left", local_left, 1)
    at_least("s2_bidirectional", "local_right", local_right, 1)
    before = where(lambda q, k: (q - k - (local_left - 1)) % v == 0) & causal()
    after = where(lambda q, k: (k - q - (local_right - 1)) % v == 0) & causal().T
    return (window(local_left - 1, local_right - 1) | before | after).lift(block)
