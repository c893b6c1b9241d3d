"""The sizes that both layers derive from their options."""


def head_sizes(
    in_features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the size of a head.

    Raises:
      ValueError: the features do not divide into heads, or the heads into groups.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, value in {"num_heads": num_heads, "num_kv_heads": num_kv_heads}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}"
        )
    if head_dim is None and in_features % num_heads:
        raise ValueError(
            f"in_features={in_features} must be a multiple of num_heads={num_heads}, "
            "or head_dim must be given"
        )
    return num_heads, num_kv_heads, head_dim or in_features // num_heads
