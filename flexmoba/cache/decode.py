"""A few queries against a cache: each reads the blocks that it selected, and nothing else.

arXiv 2502.13189, Sec. 2.2, where there is nothing to sort: queries of one step want blocks of
their own. The bytes read are those of the mean keys and of ``topk`` blocks a query.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.backends import ScoreMod, modify
from flexmoba.cache.options import CachedCall
from flexmoba.gate import forced_blocks, top_blocks
from flexmoba.runtime import HAS_TRITON

_MAX_DIM = 256
MAX_STEP_QUERIES = 16  # more are better sorted by block


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Whether Triton kernels can take these tensors."""
    few_dims = max(q.shape[-1], v.shape[-1]) <= _MAX_DIM
    return q.is_cuda and HAS_TRITON and q.dtype != torch.float64 and few_dims


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    rows: Tensor,
    call: CachedCall,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its own block and its ``topk - 1`` best past ones.

    Args:
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, N * block_size, D)``.
        v: ``(B, Hkv, N * block_size, Dv)``.
        means: ``(B, Hkv, N, D)``, mean keys; those of blocks that are not full are not read.
        positions: ``(B, Lq)`` int32, where each query stands; below 0 for none, which gets zeros.
        rows: ``(B, Hq or Hkv, Lq, D)``, what selects for each query, from `gate_rows`.
        call: Options; ``topk`` is at least the number of blocks that are always selected.
        score_mod: A function of every score, or None.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``, float32 or float64.
        Both are NaN for a query that stands beyond the last block.
    """
    if has_kernels(q, v) and score_mod is None:
        from flexmoba.cache.kernels import MAX_TOPK, attend_step_on_cuda

        if call.topk <= MAX_TOPK:
            return attend_step_on_cuda(q, k, v, means, positions, rows, call)
    return attend_gathered(q, k, v, means, positions, rows, call, score_mod)


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    rows: Tensor,
    call: CachedCall,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_step` by plain tensor operations, which gather the selected blocks."""
    scale, gate, block_size = call.scale, call.gate, call.block_size
    batch, kv_heads, n_blocks, _ = means.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    queries = rearrange(q.to(precise), "b (h g) l d -> b h g l d", h=kv_heads)
    own = (positions.clamp(0, n_blocks * block_size - 1) // block_size)[:, None, None]
    rows = rearrange(rows.to(precise), "b (h g) l d -> b h g l d", h=kv_heads)
    scored = call.scored
    first, end = torch.full_like(own, gate.sink_blocks), own - gate.local_blocks
    parts = [
        own[..., None],
        top_blocks(rows @ means.to(precise)[:, :, None].mT, first, end, scored),
    ]
    always = forced_blocks(torch.zeros_like(own[:, 0, 0]), own[:, 0, 0], gate)
    if always is not None:
        parts.append(always[:, None])
    group = queries.shape[2]
    chosen = torch.cat([x.expand(batch, kv_heads, group, *x.shape[3:]) for x in parts], -1)

    batch_index = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1)
    head_index = torch.arange(kv_heads, device=q.device).view(-1, 1, 1, 1)
    at = batch_index, head_index, chosen.clamp(min=0)
    keys, values = (x.unflatten(2, (n_blocks, -1))[at].to(precise) for x in (k, v))
    scores = torch.einsum("bhgld,bhgltkd->bhgltk", queries, keys) * scale
    position = chosen[..., None] * block_size + torch.arange(block_size, device=q.device)
    limit = positions[:, None, None, :, None, None]
    if score_mod is not None:
        head = head_index * group + torch.arange(group, device=q.device)[:, None, None]
        # It may look places up: those that are none, or hidden, must not lead out of its tables.
        query = limit.clamp(0, n_blocks * block_size - 1)
        key = torch.minimum(position.clamp(min=0), query)
        scores = modify(score_mod, scores, batch_index[..., None], head[..., None], query, key)
    seen = (position <= limit) & (chosen >= 0)[..., None]
    scores = scores.masked_fill(~seen, float("-inf")).flatten(-2)

    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    # What is not seen, such as what a reset left behind, may be NaN: 0 * NaN is NaN.
    values = values.masked_fill_(~seen[..., None], 0.0)
    out = torch.einsum("bhglk,bhglkd->bhgld", weights, values.flatten(-3, -2))
    beyond = (positions >= n_blocks * block_size)[:, None, None]
    out, lse = out.masked_fill(beyond[..., None], math.nan), lse.masked_fill(beyond, math.nan)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
