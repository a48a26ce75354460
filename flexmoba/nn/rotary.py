"""Rotary position embedding (RoPE), of whatever positions."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turns each pair of dims ``(i, i + D / 2)`` by ``position * base ** (-2 i / D)``.

    Args:
        x: Queries or keys, ``(B, H, L, D)``, ``D`` even.
        positions: Where every token stands in its sequence, ``(B or 1, L)`` ints.
        base: The base of the wavelengths, such as 10000.

    Returns:
        ``(B, H, L, D)`` in the dtype of ``x``; angles and products are computed in float32 at
        least.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** -(torch.arange(half, dtype=precise, device=x.device) / half)
    angle = (positions.to(precise)[..., None] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
