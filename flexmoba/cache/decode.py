"""Attention of a decoding step: few queries, each of which reads only its selected blocks.

arXiv 2502.13189, Sec. 2.2, without sorting queries by block: the few queries of a step rarely share
a block. A step reads the mean keys, and the keys and values of ``topk`` blocks for each query.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.backends import ScoreMod, apply_score_mod
from flexmoba.cache.options import CachedCall
from flexmoba.gate import block_scores, forced_blocks, top_blocks
from flexmoba.runtime import HAS_TRITON

_MAX_DIM = 256
MAX_STEP_QUERIES = 16  # for more queries, sorting them by block is faster


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Returns whether the Triton kernels support queries ``q`` and values ``v``."""
    few_dims = max(q.shape[-1], v.shape[-1]) <= _MAX_DIM
    return q.is_cuda and HAS_TRITON and q.dtype != torch.float64 and few_dims


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    gate_rows: Tensor,
    call: CachedCall,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends from each query to its own block and to the ``topk - 1`` past blocks it selects.

    Args:
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, N * block_size, D)``.
        v: ``(B, Hkv, N * block_size, Dv)``.
        means: Mean keys, ``(B, Hkv, N * sub_blocks, D)``; only those of full blocks are read.
        positions: Position of each query, ``(B, Lq)`` int32; negative for padding, whose output is
            zeros.
        gate_rows: Rows that the gate scores, ``(B, Hq or Hkv, Lq, D)``: queries, or sums of the
            queries of a KV head, from `flexmoba.gate.gate_rows`.
        call: Options; ``topk`` is at least the number of blocks that are always selected.
        score_mod: A function that modifies every score, or None.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q``, and the log-sum-exp ``(B, Hq, Lq)``,
        float32 or float64. Both are NaN for a query whose position is beyond the last block.
    """
    if has_kernels(q, v) and score_mod is None:
        from flexmoba.cache.kernels import MAX_TOPK, attend_step_on_cuda

        if call.topk <= MAX_TOPK:
            return attend_step_on_cuda(q, k, v, means, positions, gate_rows, call)
    return attend_gathered(q, k, v, means, positions, gate_rows, call, score_mod)


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    gate_rows: Tensor,
    call: CachedCall,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `attend_step` by plain tensor operations, which gather the selected blocks."""
    batch, kv_heads, n_blocks = *means.shape[:2], means.shape[2] // call.gate.sub_blocks
    selected = select_for_step(gate_rows, means, positions, q.shape[1], call)
    batch_index = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1)
    head_index = torch.arange(kv_heads, device=q.device).view(-1, 1, 1, 1)
    index = batch_index, head_index, selected.clamp(min=0)
    keys, values = (x.unflatten(2, (n_blocks, -1))[index] for x in (k, v))
    capacity = n_blocks * call.block_size
    clamped = positions.clamp(max=capacity - 1)
    out, lse = attend_to_gathered(q, keys, values, selected, clamped, call, score_mod)
    beyond = (positions >= capacity)[:, None]
    return out.masked_fill(beyond[..., None], math.nan), lse.masked_fill(beyond, math.nan)


def select_for_step(
    gate_rows: Tensor, means: Tensor, positions: Tensor, heads: int, call: CachedCall
) -> Tensor:
    """Selects the blocks of each query: its own block, and ``topk - 1`` past blocks.

    Args:
        gate_rows: ``(B, Hq or Hkv, Lq, D)``, as in `attend_step`.
        means: Mean keys of the sub-blocks of N blocks, ``(B, Hkv, N * sub_blocks, D)``.
        positions: ``(B, Lq)`` int32, as in `attend_step`.
        heads: Query heads ``Hq``.
        call: Options.

    Returns:
        Block indices, ``(B, Hkv, Hq / Hkv, Lq, topk)``; -1 for none.
    """
    gate, block_size = call.gate, call.block_size
    batch, kv_heads, n_blocks = *means.shape[:2], means.shape[2] // gate.sub_blocks
    precise = torch.promote_types(means.dtype, torch.float32)
    own = (positions.clamp(0, n_blocks * block_size - 1) // block_size)[:, None, None]
    gate_rows = rearrange(gate_rows.to(precise), "b (h g) l d -> b h g l d", h=kv_heads)
    gate_scores = block_scores(gate_rows @ means.to(precise)[:, :, None].mT, gate.sub_blocks)
    first, end = torch.full_like(own, gate.sink_blocks), own - gate.local_blocks
    selections = [own[..., None], top_blocks(gate_scores, first, end, call.scored)]
    forced = forced_blocks(torch.zeros_like(own[:, 0, 0]), own[:, 0, 0], gate)
    if forced is not None:
        selections.append(forced[:, None])
    group = heads // kv_heads
    return torch.cat([x.expand(batch, kv_heads, group, *x.shape[3:]) for x in selections], -1)


def attend_to_gathered(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    selected: Tensor,
    positions: Tensor,
    call: CachedCall,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends from each query to the keys of its selected blocks, up to its own position.

    Args:
        q: ``(B, Hq, Lq, D)``.
        keys: Keys of the selected blocks, ``(B, Hkv, Hq / Hkv, Lq, topk, block_size, D)``.
        values: Values of the selected blocks, ``(B, Hkv, Hq / Hkv, Lq, topk, block_size, Dv)``,
            which the function may overwrite.
        selected: Block indices, ``(B, Hkv, Hq / Hkv, Lq, topk)``; -1 for none.
        positions: Position of each query, ``(B, Lq)`` int32; negative for padding.
        call: Options.
        score_mod: A function that modifies every score, or None.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q``, and the log-sum-exp ``(B, Hq, Lq)``,
        float32 or float64.
    """
    block_size, (batch, kv_heads, group) = call.block_size, selected.shape[:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    queries = rearrange(q.to(precise), "b (h g) l d -> b h g l d", h=kv_heads)
    scores = torch.einsum("bhgld,bhgltkd->bhgltk", queries, keys.to(precise)) * call.scale
    key_position = selected[..., None] * block_size + torch.arange(block_size, device=q.device)
    query_position = positions[:, None, None, :, None, None]
    if score_mod is not None:
        batch_index = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1, 1)
        head = torch.arange(kv_heads * group, device=q.device).view(kv_heads, group, 1, 1, 1)
        # A score_mod may index tensors by position. Masked scores must not lead out of bounds.
        q_idx = query_position.clamp(min=0)
        kv_idx = torch.minimum(key_position.clamp(min=0), q_idx)
        scores = apply_score_mod(score_mod, scores, batch_index, head, q_idx, kv_idx)
    visible = (key_position <= query_position) & (selected >= 0)[..., None]
    scores = scores.masked_fill(~visible, float("-inf")).flatten(-2)

    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    # Masked values may be NaN, such as values from before a reset, and 0 * NaN is NaN.
    values = values.to(precise).masked_fill_(~visible[..., None], 0.0)
    out = torch.einsum("bhglk,bhglkd->bhgld", weights, values.flatten(-3, -2))
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
