"""Validation of the sizes that the layers with projections share."""

from flexmoba.checks import check_positive


def check_heads(dim: int, heads: int, kv_heads: int, head_dim: int | None) -> int:
    """Raises unless the sizes are positive and fit each other; returns the head dim."""
    sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads}
    if head_dim is not None:
        sizes["head_dim"] = head_dim
    for name, size in sizes.items():
        check_positive(name, size, "pass a number of features or heads")
    if heads % kv_heads != 0:
        raise ValueError(
            f"heads must be a multiple of kv_heads, got heads={heads} and kv_heads={kv_heads}; "
            "change one of them"
        )
    if head_dim is None and dim % heads != 0:
        raise ValueError(
            f"dim must be a multiple of heads, got dim={dim} and heads={heads}; change one of "
            "them, or pass head_dim"
        )
    return dim // heads if head_dim is None else head_dim


def check_rotary(head_dim: int, rope_base: float | None) -> None:
    """Raises unless heads of this size can have a rotary embedding with this base, or None."""
    if rope_base is not None and (head_dim % 2 != 0 or rope_base <= 0):
        raise ValueError(
            f"a rotary embedding needs an even head_dim and a positive rope_base, got "
            f"head_dim={head_dim} and rope_base={rope_base}; change them, or pass "
            "rope_base=None"
        )
