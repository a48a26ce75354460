"""Computes mean keys and the blocks with the highest scores, by plain tensor operations.

arXiv 2502.13189, Sec. 2.2, Eq. 5 and 6. The selection is exact and deterministic: means and scores
accumulate in float32 (float64 for float64 inputs), and of equal scores the more recent block wins.

The gate may divide each block into sub-blocks. It then scores the mean keys of the sub-blocks, and
the score of a block is the highest of these scores.
"""

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.gate.options import GateOptions

# Number of scores in memory at a time. A loop over pieces of the queries bounds it.
_SCORES_AT_ONCE = 2**22

# Up to this many blocks, one `argmax` for each is faster on CPU than `topk`.
_MOST_ROUNDS = 12


def block_means(
    k: Tensor, block_size: int, keys_of_block: Tensor | None = None, sub_blocks: int = 1
) -> Tensor:
    """Returns the mean key of every sub-block, by default of every block.

    A short block may have empty sub-blocks. They get the mean key of the first sub-block of their
    block, which leaves the highest score of the block as it is.

    Args:
        k: Keys, ``(B, Hkv, Lk, D)``. Given ``keys_of_block``, ``Lk`` is a multiple of the block
            size, and short blocks hold zeros after their keys.
        block_size: Keys in a block, a multiple of ``sub_blocks``.
        keys_of_block: As in `Candidates`.
        sub_blocks: Number of sub-blocks in a block.

    Returns:
        ``(B, Hkv, blocks * sub_blocks, D)`` in the dtype of ``k``.
    """
    precise = torch.promote_types(k.dtype, torch.float32)
    batch, heads, length, dim = k.shape
    size = block_size // sub_blocks
    if keys_of_block is not None:
        first_key = torch.arange(0, block_size, size, device=k.device)
        keys = (keys_of_block[..., None] - first_key).clamp(0, size).flatten(1)[:, None, :, None]
        sums = k.view(batch, heads, -1, size, dim).sum(3, dtype=precise)
        means = (sums / keys.clamp(min=1)).to(k.dtype)
        if sub_blocks == 1:
            return means
        first = means[:, :, ::sub_blocks].repeat_interleave(sub_blocks, 2)
        return torch.where(keys > 0, means, first)
    n_full = length // size
    full = k[:, :, : n_full * size].view(batch, heads, n_full, size, dim)
    # On CUDA, torch accumulates half precision in float32 and rounds the mean in the same kernel.
    # On CPU, it rounds the sum.
    dtype = k.dtype if k.is_cuda else precise
    parts = [full.mean(3, dtype=dtype)]
    if n_full * size < length:
        parts.append(k[:, :, n_full * size :].mean(2, keepdim=True, dtype=dtype))
    means = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    empty = -means.shape[2] % sub_blocks
    if empty > 0:
        first = means[:, :, empty - sub_blocks, None].expand(-1, -1, empty, -1)
        means = torch.cat([means, first], dim=2)
    return means.to(k.dtype)


def forced_blocks(first: Tensor, end: Tensor, gate: GateOptions) -> Tensor | None:
    """Returns the local and sink blocks from ``first`` to before ``end``, -1 for none.

    A block that is both counts as a sink block.

    Args:
        first: ``(B or 1, rows or 1)`` ints, the first candidate block of each row.
        end: ``(B or 1, rows)`` ints, the block after the last candidate.
        gate: Options of the gate.

    Returns:
        ``(B or 1, 1, rows, local_blocks + sink_blocks)`` int32; None if the gate has neither.
    """
    if gate.forced == 0:
        return None
    first, end = first[..., None], end[..., None]
    local = end - torch.arange(1, gate.local_blocks + 1, device=end.device)
    local = torch.where(local >= first + gate.sink_blocks, local, -1)
    sink = first + torch.arange(gate.sink_blocks, device=end.device)
    sink = torch.where(sink < end, sink, -1)
    return torch.cat([local, sink], dim=-1).int()[:, None]


def top_blocks_in_pieces(
    rows: Tensor, means: Tensor, first: Tensor, end: Tensor, count: int, sub_blocks: int = 1
) -> Tensor:
    """Returns the blocks with the ``count`` highest scores from ``first`` to before ``end``.

    Args:
        rows: ``(B, Hq or Hkv, rows, D)``, from `gate_rows`.
        means: Mean keys of sub-blocks, ``(B, Hkv, blocks * sub_blocks, D)``.
        first: ``(B or 1, rows or 1)`` ints, the first candidate block of each row.
        end: ``(B or 1, rows or 1)`` ints, the block after the last candidate.
        count: Number of blocks to select.
        sub_blocks: Number of sub-blocks in a block.

    Returns:
        ``(B, Hq or Hkv, rows, count)`` int32, by descending score; -1 for none.
    """
    batch, heads, n_rows, _ = rows.shape
    kv_heads, n_means = means.shape[1:3]
    precise = torch.promote_types(rows.dtype, torch.float32)
    grouped = rearrange(rows, "b (h g) l d -> b h g l d", h=kv_heads)
    keys = means.to(precise)[:, :, None].mT
    first, end = (x.expand(x.shape[0], n_rows)[:, None, None] for x in (first, end))
    piece = max(1, _SCORES_AT_ONCE // (batch * heads * n_means))
    selected_pieces = [
        top_blocks(
            block_scores(grouped[..., start : start + piece, :].to(precise) @ keys, sub_blocks),
            first[..., start : start + piece],
            end[..., start : start + piece],
            count,
        )
        for start in range(0, n_rows, piece)
    ]
    selected: Tensor = rearrange(torch.cat(selected_pieces, dim=-2), "b h g l t -> b (h g) l t")
    return selected


def block_scores(scores: Tensor, sub_blocks: int) -> Tensor:
    """Returns the score of each block, ``(..., blocks)``: the highest score of its sub-blocks.

    NaN is the highest score. ``scores`` are ``(..., blocks * sub_blocks)``.
    """
    return scores if sub_blocks == 1 else scores.unflatten(-1, (-1, sub_blocks)).amax(-1)


def top_blocks(scores: Tensor, first: Tensor, end: Tensor, count: int) -> Tensor:
    """Returns the blocks with the ``count`` highest scores; of equal scores, the later block first.

    Args:
        scores: ``(..., blocks)``, floating point.
        first: Ints that expand to ``(...)``, the first candidate block of each row.
        end: Ints that expand to ``(...)``, the block after the last candidate.
        count: Number of blocks to select.

    Returns:
        ``(..., count)`` int32, by descending score; -1 for none.
    """
    n_blocks = scores.shape[-1]
    # A candidate with a score of -inf still ranks before a block that is no candidate.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    block = torch.arange(n_blocks, device=scores.device)
    not_candidate = (block < first[..., None]) | (block >= end[..., None])
    scores = scores.masked_fill(not_candidate, float("-inf"))
    n_candidates = end - first
    # `argmax` and `_descending` prefer the first of equal scores, so reverse the order of blocks.
    scores = scores.flip(-1)
    selected = scores.new_full((*scores.shape[:-1], count), -1, dtype=torch.int32)
    if count > _MOST_ROUNDS:
        order = _descending(scores, min(count, n_blocks))
        best = (n_blocks - 1 - order).int()
        rank = torch.arange(best.shape[-1], device=best.device)
        selected[..., : best.shape[-1]] = torch.where(rank < n_candidates[..., None], best, -1)
        return selected
    for i in range(min(count, n_blocks)):
        best = scores.argmax(dim=-1, keepdim=True)
        scores.scatter_(-1, best, float("-inf"))
        selected[..., i] = torch.where(i < n_candidates, (n_blocks - 1 - best[..., 0]).int(), -1)
    return selected


def _descending(scores: Tensor, count: int) -> Tensor:
    """Returns the indices of the ``count`` highest scores, first index first, NaN highest."""
    if scores.dtype != torch.float32:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    # `topk` is not stable, and a stable sort takes ten times as long. So `topk` compares integers
    # that hold a score in the high bits and its index in the low bits, which leaves no ties.
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the scores
    bits = bits.masked_fill_(scores.isnan(), 0x7FFFFFFF)
    last = scores.shape[-1] - 1
    index = torch.arange(last, -1, -1, device=scores.device)
    best = ((bits.long() << 32) | index).topk(count, dim=-1).values
    return last - (best & 0xFFFFFFFF)
