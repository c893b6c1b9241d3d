"""Sparse query attention: fewer query heads of unchanged width."""

from typing import Literal, get_args

Variant = Literal["SQA", "sSQA", "xSQA", "xSMQA"]
# By what factor query heads and key heads are fewer; 0: one key head.
FEWER: dict[Variant, tuple[int, int]] = {
    "SQA": (2, 4),
    "sSQA": (2, 2),
    "xSQA": (4, 4),
    "xSMQA": (4, 0),
}


def sqa(num_heads: int = 16, variant: Variant = "SQA") -> dict[str, int]:
    """The head counts of a ``SparseAttention`` layer, whatever its spec.

    Filipek, Sparse query attention (SQA): a computationally efficient attention
    mechanism with query heads reduction, 2025. A head is ``in_features // num_heads``
    wide, so the scores cost in proportion to the query heads, and the output projection
    is rectangular::

        SparseAttention("causal()", in_features=256, rngs=rngs, **sqa(16, "xSQA"))

    Args:
      num_heads: heads of the dense layer, which say how wide a head is.
      variant: query and key heads for 16 heads, as in the published models: 8 and 4
        ("SQA"), 8 and 8 ("sSQA", symmetric), 4 and 4 ("xSQA", extreme), 4 and 1
        ("xSMQA").

    Raises:
      ValueError: there is no such variant, or it does not divide the heads.

    Example:
      >>> from sadsl import catalog
      >>> catalog.sqa(16, "xSQA")
      {'num_heads': 16, 'num_q_heads': 4, 'num_kv_heads': 4}
    """
    if variant not in get_args(Variant):
        known = ", ".join(map(repr, get_args(Variant)))
        raise ValueError(f"variant={variant!r} must be one of {known}")
    queries, keys = FEWER[variant]
    if num_heads < 1 or num_heads % max(queries, keys):
        raise ValueError(
            f"num_heads={num_heads} must be a positive multiple of "
            f"{max(queries, keys)} for variant={variant!r}"
        )
    num_kv_heads = num_heads // keys if keys else 1
    return {
        "num_heads": num_heads,
        "num_q_heads": num_heads // queries,
        "num_kv_heads": num_kv_heads,
    }
