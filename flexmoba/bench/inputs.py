"""The inputs of the benchmark: random queries, or queries whose selections are correlated."""

import torch
from torch import Tensor

from flexmoba.bench.configs import Config

# Neighbouring queries of a trained language model (135M parameters, 8K tokens of text, seven
# layers) share 61 to 81 % of their past blocks, by the Jaccard index, and a tile of 64 queries
# selects 2.3 times the blocks of one query. With these values, queries share 70 % at block 512 and
# topk 3, and 64 % at block 128 and topk 8; a tile selects 2.3 times the blocks of a query.
_SPAN = 512  # tokens between two random directions of the queries
_SHARE = 0.92  # of the variance of a query, in its direction; the rest is independent


def inputs_of(
    config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns queries, keys, values and a gradient of the output, normal, from a fixed seed.

    Args:
        config: The configuration. If it is correlated, the queries of a head follow a direction
            that turns slowly with their position, so that neighbours select similar blocks.
        device: Device of the inputs.
        dtype: Dtype of the inputs.

    Returns:
        ``q (B, Hq, L, D)``, ``k (B, Hkv, L, D)``, ``v (B, Hkv, L, Dv)`` and
        ``grad (B, Hq, L, Dv)``.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, length: int, dim: int = config.head_dim) -> Tensor:
        shape = config.batch, heads, length, dim
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q, k = (normal(heads, config.length) for heads in (config.heads, config.kv_heads))
    v = normal(config.kv_heads, config.length, config.values_dim)
    if config.correlated:
        anchors = normal(config.heads, config.length // _SPAN + 2)
        position = torch.arange(config.length, device=device)
        before = position // _SPAN
        weight = (position % _SPAN / _SPAN)[:, None].to(dtype)
        direction = torch.lerp(anchors[:, :, before], anchors[:, :, before + 1], weight)
        direction /= ((1 - weight) ** 2 + weight**2).sqrt()  # the variance of each element is 1
        q = _SHARE**0.5 * direction + (1 - _SHARE) ** 0.5 * q
    return q, k, v, normal(config.heads, config.length, config.values_dim)
