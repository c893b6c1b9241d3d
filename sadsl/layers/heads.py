"""The numbers of heads, and the width of a head, that both layers derive."""


def head_sizes(
    in_features: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    num_q_heads: int | None = None,
) -> tuple[int, int, int]:
    """Numbers of query heads and of key and value heads, and the width of a head.

    A head is ``in_features // num_heads`` wide, however few query heads there are
    (Filipek, Sparse query attention, 2025).

    Raises:
      ValueError: the features do not divide into heads, or the heads into groups.
    """
    q_name = "num_heads" if num_q_heads is None else "num_q_heads"
    num_q_heads = num_heads if num_q_heads is None else num_q_heads
    num_kv_heads = num_q_heads if num_kv_heads is None else num_kv_heads
    sizes = {"num_heads": num_heads, q_name: num_q_heads, "num_kv_heads": num_kv_heads}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if num_q_heads > num_heads:
        raise ValueError(
            f"num_q_heads={num_q_heads} must be at most num_heads={num_heads}, which "
            "says how wide a head is: raise num_heads, or give head_dim"
        )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"{q_name}={num_q_heads} must be a multiple of num_kv_heads={num_kv_heads}"
        )
    if head_dim is None and in_features % num_heads:
        raise ValueError(
            f"in_features={in_features} must be a multiple of num_heads={num_heads}, "
            "or head_dim must be given"
        )
    return num_q_heads, num_kv_heads, head_dim or in_features // num_heads
