"""Mean keys, and the blocks of the highest scores, by plain tensor operations.

arXiv 2502.13189, Sec. 2.2, Eq. 5 and 6. The selection is exact and deterministic: means and scores
accumulate in float32 (float64 for float64 inputs), and of equal scores the more recent block wins.
"""

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.gate.options import GateOptions

# Scores that exist at a time. Queries are processed in pieces, so that memory stays small.
_SCORES_AT_ONCE = 2**22

# Blocks up to which rounds of `argmax`, one for each, are faster on CPU than `topk`.
_MOST_ROUNDS = 12


def block_means(k: Tensor, block_size: int, keys_of_block: Tensor | None = None) -> Tensor:
    """The mean key of every block, ``(B, Hkv, blocks, D)`` in the dtype of ``k``.

    Short blocks, by ``keys_of_block`` of `Candidates`, hold zeros after their keys.
    """
    precise = torch.promote_types(k.dtype, torch.float32)
    batch, heads, length, dim = k.shape
    if keys_of_block is not None:  # k is padded to a multiple of the block size
        sums = k.view(batch, heads, -1, block_size, dim).sum(3, dtype=precise)
        return (sums / keys_of_block.clamp(min=1)[:, None, :, None]).to(k.dtype)
    n_full = length // block_size
    blocks = k[:, :, : n_full * block_size].view(batch, heads, n_full, block_size, dim)
    means = blocks.mean(3, dtype=precise)
    if n_full * block_size < length:
        tail = k[:, :, n_full * block_size :].mean(2, keepdim=True, dtype=precise)
        means = torch.cat([means, tail], dim=2)
    return means.to(k.dtype)


def forced_blocks(first: Tensor, end: Tensor, gate: GateOptions) -> Tensor | None:
    """Local blocks and sinks between blocks ``first`` and ``end``, ``(B, 1, rows, blocks)`` int32.

    A block that is both counts as a sink. None if the gate has neither.
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
    rows: Tensor, means: Tensor, first: Tensor, end: Tensor, count: int
) -> Tensor:
    """The best blocks from ``first`` to before ``end``, both ``(B or 1, rows or 1)``."""
    batch, heads, n_rows, _ = rows.shape
    kv_heads, n_blocks = means.shape[1:3]
    precise = torch.promote_types(rows.dtype, torch.float32)
    grouped = rearrange(rows, "b (h g) l d -> b h g l d", h=kv_heads)
    keys = means.to(precise)[:, :, None].mT
    first, end = (x.expand(x.shape[0], n_rows)[:, None, None] for x in (first, end))
    piece = max(1, _SCORES_AT_ONCE // (batch * heads * n_blocks))
    chosen = [
        top_blocks(
            grouped[..., start : start + piece, :].to(precise) @ keys,
            first[..., start : start + piece],
            end[..., start : start + piece],
            count,
        )
        for start in range(0, n_rows, piece)
    ]
    selected: Tensor = rearrange(torch.cat(chosen, dim=-2), "b h g l t -> b (h g) l t")
    return selected


def top_blocks(scores: Tensor, first: Tensor, end: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores of each row, the later of equals first.

    Candidates are the blocks from ``first`` to before ``end``, which expand to the rows.
    """
    n_blocks = scores.shape[-1]
    # A candidate that scores -inf still comes before a block that is none.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    block = torch.arange(n_blocks, device=scores.device)
    foreign = (block < first[..., None]) | (block >= end[..., None])
    scores = scores.masked_fill(foreign, float("-inf"))
    candidates = end - first
    # The first of equals comes first here: turned around, that is the later block.
    scores = scores.flip(-1)
    chosen = scores.new_full((*scores.shape[:-1], count), -1, dtype=torch.int32)
    if count > _MOST_ROUNDS:
        order = _descending(scores, min(count, n_blocks))
        best = (n_blocks - 1 - order).int()
        place = torch.arange(best.shape[-1], device=best.device)
        chosen[..., : best.shape[-1]] = torch.where(place < candidates[..., None], best, -1)
        return chosen
    for i in range(min(count, n_blocks)):
        best = scores.argmax(dim=-1, keepdim=True)
        scores.scatter_(-1, best, float("-inf"))
        chosen[..., i] = torch.where(i < candidates, (n_blocks - 1 - best[..., 0]).int(), -1)
    return chosen


def _descending(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of each row, the first of equals first, NaN before all."""
    if scores.dtype != torch.float32:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    # `topk` does not keep equals in order, and a stable sort takes ten times as long: of one number
    # each, the score above its index, none are equal.
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # now ordered like the scores
    bits = bits.masked_fill_(scores.isnan(), 0x7FFFFFFF)
    last = scores.shape[-1] - 1
    index = torch.arange(last, -1, -1, device=scores.device)
    best = ((bits.long() << 32) | index).topk(count, dim=-1).values
    return last - (best & 0xFFFFFFFF)
