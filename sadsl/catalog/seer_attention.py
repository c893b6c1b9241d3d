"""SeerAttention: blocks chosen by a learned gate."""

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
    """The blocks that a gate scores above ``tau``, and all for the last rows of blocks.

    Gao et al., SeerAttention: learning intrinsic sparse attention in your LLMs, 2024,
    section 3. The gate's scores are the operand ``gate``, ``[heads, blocks, blocks]``:
    see ``sadsl.layers.gate``. ``ratio`` keeps that share of the causal blocks instead,
    equally many a row. The block of the query is not forced unless ``diagonal``.
    """
    forced = where(
        lambda q, k, h, n: q // block >= (n + (block - 1)) // block - dense_rows
    )
    forced = forced | blocks(block) if diagonal else forced
    given = {"block": block, "score": gate, "forced": forced, "eligible": causal()}
    if ratio is None:
        return causal() & threshold(tau, **given)
    return causal() & topk(share(ratio, of="triangle"), **given)
