"""SeerAttention: a learned gate chooses blocks."""

from sadsl.maps.base import IndexMap
from sadsl.maps.named import blocks, causal, where
from sadsl.selections import share, threshold, topk


def seer_attention(
    tau: float = 2e-3,
    *,
    ratio: float | None = None,
    block: int = 64,
    dense_rows: int = 2,
    diagonal: bool = False,
    gate: str = "gate",
) -> IndexMap:
    """A query sees the blocks that a learned gate scores above ``tau``.

    Gao et al., SeerAttention: learning intrinsic sparse attention in your LLMs, 2024,
    section 3. The gate's scores are the operand ``gate``, ``[heads, blocks, blocks]``;
    the layer ``sadsl.layers.gate.BlockGate`` makes them.

    Args:
      tau: least score of a block that is seen.
      ratio: keeps this share of the causal blocks instead, equally many in each row.
      block: positions in a block.
      dense_rows: last rows of blocks, whose queries see every earlier key.
      diagonal: whether the query's own block is always seen.
      gate: name of the operand.

    Example:
      >>> from sadsl import catalog
      >>> print(catalog.seer_attention(block=16))
      causal() & threshold(0.002, block=16, score='gate', forced=where(lambda q, k, h,
      n: (n + 15) // 16 - 2 <= q // 16), eligible=causal())
    """
    forced = where(
        lambda q, k, h, n: q // block >= (n + (block - 1)) // block - dense_rows
    )
    forced = forced | blocks(block) if diagonal else forced
    given = {"block": block, "score": gate, "forced": forced, "eligible": causal()}
    if ratio is None:
        return causal() & threshold(tau, **given)
    return causal() & topk(share(ratio, of="triangle"), **given)
