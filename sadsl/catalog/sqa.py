"""Sparse query attention: fewer query heads, each as wide as if there were all."""

from typing import Literal, get_args

Variant = Literal["SQA", "sSQA", "xSQA", "xSMQA"]
# How many times fewer the query heads are, and the key heads.
FEWER: dict[Variant, tuple[int, int]] = {
    "SQA": (2, 4),
    "sSQA": (2, 2),
    "xSQA": (4, 4),
    "xSMQA": (4, 0),
}


def sqa(num_heads: int = 16, variant: Variant = "SQA") -> dict[str, int]:
    """The head counts of a ``SparseAttention`` layer, whatever its spec.

    Filipek, Sparse query attention (SQA): a computationally efficient attention
    mechanism with query heads reduction, 2025; the counts are those of its published
    models, where ``num_heads`` is 16: query and key heads are 8 and 4 ("SQA"), 8 and 8
    ("sSQA", symmetric), 4 and 4 ("xSQA", extreme), 4 and 1 ("xSMQA"). A head is
    ``in_features // num_heads`` wide, so the scores cost in proportion to the query
    heads, and the output projection is rectangular::

        SparseAttention("causal()", in_features=256, rngs=rngs, **sqa(16, "xSQA"))

    Raises:
      ValueError: there is no such variant, or it does not divide the heads.
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
