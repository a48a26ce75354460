"""Synthetic queries and keys with a structure, to show the tools without a model."""

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
    """Returns queries and keys that imitate a text with recurring topics.

    The text consists of sections of random length, each about one of a few topics. A key points in
    the direction of its topic. A query points to the topic of its section or, in one of four
    cases, to a random topic. The heads differ in their noise. Recent keys get more weight, because
    one component of each vector rotates slowly with the position. The tensors come from no model:
    they show how to read the numbers, and the numbers hold for this text alone.

    Args:
        length: Number of tokens, at least 1.
        heads: Number of query heads.
        kv_heads: Number of KV heads, a divisor of ``heads``.
        head_dim: Head dim.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        seed: Seed of the random numbers. The same seed gives the same tensors.

    Returns:
        q ``(1, heads, length, head_dim)`` and k ``(1, kv_heads, length, head_dim)``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics = 16
    ends = torch.randint(50, 500, (length // 50 + 1,), generator=generator).cumsum(0)
    section = torch.searchsorted(ends, torch.arange(length), right=True)
    topic_of_section = torch.randint(topics, (len(ends) + 1,), generator=generator)
    topic = topic_of_section[section]
    random_topic = torch.randint(topics, (length,), generator=generator)
    query_topic = torch.where(torch.rand(length, generator=generator) < 0.25, random_topic, topic)

    direction = torch.nn.functional.normalize(normal(kv_heads, topics, head_dim), dim=-1)
    angle = torch.arange(length) * (math.pi / length)
    rotating = torch.zeros(length, head_dim)
    rotating[:, 0], rotating[:, 1] = angle.cos(), angle.sin()
    clarity = torch.linspace(1.0, 0.5, heads)[:, None, None] * head_dim**0.5 * 4
    k = direction[:, topic] + rotating + normal(kv_heads, length, head_dim) * head_dim**-0.5
    q = direction.repeat_interleave(heads // kv_heads, 0)[:, query_topic] + rotating
    q = q * clarity + normal(heads, length, head_dim)
    return q[None].to(device, dtype), k[None].to(device, dtype)
