"""Attention of tiles of queries, each to the keys of one block, by batched matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of tiles ``(tiles, rows, D)``, the last keys of each partly hidden."""
    scores = (q * scale) @ k.mT
    if hidden.shape[-1]:
        scores[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    # A hidden key has weight 0, and 0 * NaN is NaN: values that are not finite are taken out of
    # the product, and rows where their weight is not 0 set to NaN.
    reached = weights @ (~v.isfinite()).to(v.dtype) > 0
    out = (weights @ finite(v)).div_(total).masked_fill_(reached, float("nan"))
    return out, highest.add_(total.log_()).squeeze(-1)


def attend_tiles_by_torch(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend_tiles` by the kernel behind torch's attention on CPU, of what cannot overflow."""
    mask = None
    if hidden.shape[-1]:
        mask = q.new_zeros((hidden.shape[0], 1, q.shape[1], k.shape[1]))
        mask[:, 0, :, -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    value_dim, dim = v.shape[-1], max(q.shape[-1], v.shape[-1])  # the kernel wants them equal
    q, k, v = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
    )
    return out[:, 0, :, :value_dim], lse[:, 0]


def attend_rows_apart(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, limit: float
) -> tuple[Tensor, Tensor]:
    """`_tile_attention_by_torch`, but rows that reach something beyond the limit by `attend_tiles`.

    The two round differently: what other rows hold, or see, must not choose for a row.
    """
    if all(is_within(limit, x) for x in (q, k, v)):
        return attend_tiles_by_torch(q, k, v, hidden, scale)
    small_q, small_k, small_v = (x.abs() <= limit for x in (q, k, v))
    large = ~(small_k.all(-1) & small_v.all(-1))[:, None].repeat(1, q.shape[1], 1)
    if hidden.shape[-1]:
        large[..., -hidden.shape[-1] :].masked_fill_(hidden, False)
    apart = large.any(-1) | ~small_q.all(-1)
    out, lse = attend_tiles_by_torch(
        q.where(small_q, 0.0), k.where(small_k, 0.0), v.where(small_v, 0.0), hidden, scale
    )
    large_out, large_lse = attend_tiles(q, k, v, hidden, scale)
    return torch.where(apart[..., None], large_out, out), torch.where(apart, large_lse, lse)


def is_within(limit: float, x: Tensor) -> bool:
    """Whether no element exceeds the limit in magnitude; False for NaN."""
    lowest, highest = x.aminmax()
    return -limit <= float(lowest) and float(highest) <= limit


def finite(x: Tensor) -> Tensor:
    """``x`` with zeros in place of NaN and inf."""
    return x.nan_to_num(0.0, 0.0, 0.0)
