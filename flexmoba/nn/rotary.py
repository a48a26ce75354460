"""Rotary position embedding (RoPE) at given positions."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotates each pair of dims ``(i, i + D / 2)`` by ``position * base ** (-2 i / D)`` radians.

    Args:
        x: Queries or keys, ``(B, H, L, D)``, ``D`` even.
        positions: Position of every token in its sequence, ``(B or 1, L)``, an integer dtype.
        base: Base of the wavelengths, such as 10000.

    Returns:
        ``(B, H, L, D)`` in the dtype of ``x``, computed in float32, or in float64 for float64
        ``x``.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** -(torch.arange(half, dtype=precise, device=x.device) / half)
    angle = (positions.to(precise)[..., None] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
