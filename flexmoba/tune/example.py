"""Queries and keys made up to have a structure: what a command can show without a model."""

import math

import torch
from torch import Tensor


def synthetic(
    length: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a made-up text of topics that come, go and come again.

    The text is stretches of random length, each on one of a few topics. A key points to the topic
    that it is on, and a query to its own topic or, one time in four, to another. Every head's
    keys are more or less plain to tell apart from noise. Recent keys weigh more, since a part of
    each vector turns slowly with its position. No model made them: they show how to read the
    numbers, and the numbers are of this text alone.

    Args:
        length: Tokens, at least 1.
        heads: Query heads.
        kv_heads: KV heads, which divide them.
        head_dim: Elements of a vector.
        device: Where to make them.
        dtype: Of what type.
        seed: Of the random numbers; the same seed gives the same tensors.

    Returns:
        q ``(1, heads, length, head_dim)`` and k ``(1, kv_heads, length, head_dim)``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics = 16
    ends = torch.randint(50, 500, (length // 50 + 1,), generator=generator).cumsum(0)
    stretch = torch.searchsorted(ends, torch.arange(length), right=True)
    of_stretch = torch.randint(topics, (len(ends) + 1,), generator=generator)
    topic = of_stretch[stretch]
    elsewhere = torch.randint(topics, (length,), generator=generator)
    wanted = torch.where(torch.rand(length, generator=generator) < 0.25, elsewhere, topic)

    direction = torch.nn.functional.normalize(normal(kv_heads, topics, head_dim), dim=-1)
    angle = torch.arange(length) * (math.pi / length)
    turning = torch.zeros(length, head_dim)
    turning[:, 0], turning[:, 1] = angle.cos(), angle.sin()
    clarity = torch.linspace(1.0, 0.5, heads)[:, None, None] * head_dim**0.5 * 4
    k = direction[:, topic] + turning + normal(kv_heads, length, head_dim) * head_dim**-0.5
    q = direction.repeat_interleave(heads // kv_heads, 0)[:, wanted] + turning
    q = q * clarity + normal(heads, length, head_dim)
    return q[None].to(device, dtype), k[None].to(device, dtype)
