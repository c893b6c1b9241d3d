"""S2-Attention: a local band, and verticals whose phase differs by head."""

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
    """Causal form: ``local`` near blocks, and one block of every ``v``, shared by rows.

    Lin et al., S2-Attention: hardware-aware context sharding among attention heads,
    2024; the formula is that of its public kernel library, the defaults are those of
    Phi-3-small (every second layer of which is dense). Head ``h`` keeps the blocks
    ``J`` with ``(J + h * step + offset) % v == 0``, where ``step`` is
    ``max(1, v // num_kv_heads)``: the heads cover every block between them if there are
    ``v`` or more. Query heads of a group share the phase of their KV head.
    ``homo_head`` gives all of them phase ``offset``; the last ``num_dense_heads`` are
    plainly causal.
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
    """Bidirectional form: near blocks, and every ``v``-th block counted from them.

    The same library as ``s2_attention``, whose defaults these are: with the blocks
    beyond the band numbered from 1 on either side, those divisible by ``v`` are kept.
    ``local_left`` and ``local_right`` both count the own block. All heads are alike.
    """
    at_least("s2_bidirectional", "local_left", local_left, 1)
    at_least("s2_bidirectional", "local_right", local_right, 1)
    before = where(lambda q, k: (q - k - (local_left - 1)) % v == 0) & causal()
    after = where(lambda q, k: (k - q - (local_right - 1)) % v == 0) & causal().T
    return (window(local_left - 1, local_right - 1) | before | after).lift(block)
