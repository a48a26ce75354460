"""Attention of tiles of queries by batched matrix products, each to the keys of one block."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes the attention of tiles to the keys of their blocks.

    Args:
        q: Queries, ``(tiles, rows, D)``, float32 or float64.
        k: Keys, ``(tiles, keys, D)``.
        v: Values, ``(tiles, keys, Dv)``.
        masked: ``(tiles or 1, rows, n)`` bool, which of the last ``n`` keys each row does not see.
        scale: Factor on the scores.

    Returns:
        The partial outputs ``(tiles, rows, Dv)`` and their log-sum-exps ``(tiles, rows)``.
    """
    scores = (q * scale) @ k.mT
    if masked.shape[-1]:
        scores[..., -masked.shape[-1] :].masked_fill_(masked, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    # A masked key has weight 0, and 0 * NaN is NaN. The product therefore excludes values that are
    # not finite, and rows in which their weight is not 0 are set to NaN.
    is_reached = weights @ (~v.isfinite()).to(v.dtype) > 0
    out = (weights @ finite(v)).div_(total).masked_fill_(is_reached, float("nan"))
    return out, highest.add_(total.log_()).squeeze(-1)


def attend_tiles_by_torch(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes `attend_tiles` by torch's CPU kernel, for inputs whose scores cannot overflow."""
    mask = None
    if masked.shape[-1]:
        mask = q.new_zeros((masked.shape[0], 1, q.shape[1], k.shape[1]))
        mask[:, 0, :, -masked.shape[-1] :].masked_fill_(masked, float("-inf"))
    value_dim, dim = v.shape[-1], max(q.shape[-1], v.shape[-1])  # the kernel needs equal head dims
    q, k, v = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
    )
    return out[:, 0, :, :value_dim], lse[:, 0]


def attend_large_rows_apart(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scale: float, limit: float
) -> tuple[Tensor, Tensor]:
    """Computes rows that see an element beyond the limit by `attend_tiles`, others by torch.

    The two functions round differently. The function for a row must therefore not depend on the
    elements of other rows, or on keys that the row does not see.
    """
    if all(is_within(limit, x) for x in (q, k, v)):
        return attend_tiles_by_torch(q, k, v, masked, scale)
    small_q, small_k, small_v = (x.abs() <= limit for x in (q, k, v))
    large = ~(small_k.all(-1) & small_v.all(-1))[:, None].repeat(1, q.shape[1], 1)
    if masked.shape[-1]:
        large[..., -masked.shape[-1] :].masked_fill_(masked, False)
    is_large = large.any(-1) | ~small_q.all(-1)
    out, lse = attend_tiles_by_torch(
        q.where(small_q, 0.0), k.where(small_k, 0.0), v.where(small_v, 0.0), masked, scale
    )
    large_out, large_lse = attend_tiles(q, k, v, masked, scale)
    return torch.where(is_large[..., None], large_out, out), torch.where(is_large, large_lse, lse)


def is_within(limit: float, x: Tensor) -> bool:
    """Returns whether no element exceeds the limit in magnitude; False for NaN."""
    lowest, highest = x.aminmax()
    return -limit <= float(lowest) and float(highest) <= limit


def finite(x: Tensor) -> Tensor:
    """Returns ``x`` with zeros in place of NaN and inf."""
    return x.nan_to_num(0.0, 0.0, 0.0)
