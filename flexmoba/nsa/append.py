"""Appends new tokens to the tensors of a cache, and compresses the blocks that they fill.

arXiv 2502.11089, Sec. 3.3.1: a block joins the compressed keys when its last token arrives.
"""

import torch
from torch import Tensor

from flexmoba.cache import MAX_STEP_QUERIES, has_kernels, next_positions
from flexmoba.nsa.branches import block_means_of
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors, CacheState, Compress, Pair
from flexmoba.runtime import has_values


def append(
    state: CacheState,
    new: BranchTensors,
    mask: Tensor | None,
    sizes: NsaSizes,
    window: int,
    compress: Compress | None,
) -> tuple[Tensor, Pair | None]:
    """Appends tokens to every row.

    Args:
        state: The cache.
        new: Keys and values of ``n`` new tokens, ``(B, Hkv, n, D)`` and ``(B, Hkv, n, Dv)``; those
            of the compressed branch are inputs of the compression.
        mask: ``(B, n)`` bool, False for padding, or None.
        sizes: Sizes of the blocks.
        window: Tokens in a window, 0 for no window branch.
        compress: The compression, as in `NsaCache`; None for means.

    Returns:
        The positions of the tokens, ``(B, n)`` int32, -1 for padding. For a chunk, also the keys
        and values of its windows, of which the ring keeps the last ones alone: those of ``window -
        1`` tokens before the chunk and of the real tokens of the chunk, in order.
    """
    is_step = 0 < new.k.shape[2] <= MAX_STEP_QUERIES
    if is_step and mask is None and has_kernels(new.k, new.v) and has_values(new.k):
        from flexmoba.nsa.append_kernels import append_on_cuda

        return append_on_cuda(state, new, sizes, compress), None
    return append_scattered(state, new, mask, sizes, window, compress)


def append_scattered(
    state: CacheState,
    new: BranchTensors,
    mask: Tensor | None,
    sizes: NsaSizes,
    window: int,
    compress: Compress | None,
) -> tuple[Tensor, Pair | None]:
    """Computes `append` by plain tensor operations."""
    if compress is None:

        def compress(k: Tensor, v: Tensor, positions: Tensor) -> Pair:
            return block_means_of(k, sizes), block_means_of(v, sizes)

    branches, lengths = state.branches, state.lengths
    n = new.k.shape[2]
    positions = next_positions(lengths, n, mask)
    row_lengths = (positions.amax(1) + 1).clamp(min=0) if n else lengths
    count = torch.maximum(row_lengths, lengths) - lengths
    # The tokens of padding go to the last block, which nothing reads.
    capacity = branches.k.shape[2] - sizes.block_size
    fits = (positions >= 0) & (positions < capacity)
    index = torch.where(fits, positions, capacity).long()[:, None, :, None]
    for cached, x in zip(branches[:2], new[:2], strict=True):
        cached.scatter_(2, index.expand_as(x), x)
    chunk = None
    if n > MAX_STEP_QUERIES:
        # Later tokens of the chunk replace keys that earlier queries see.
        ring, tokens = (branches.k_win, branches.v_win), (new.k_win, new.v_win)
        chunk = _windows_of_chunk(ring, tokens, mask, lengths, window)
    if window > 0:
        _append_to_ring(branches, new, positions, lengths + count)
    inputs = _real_first((new.k_cmp, new.v_cmp), mask)
    _append_compressed(state, inputs, count, sizes, compress)
    lengths += count
    return positions, chunk


def _real_first(pair: Pair, mask: Tensor | None) -> Pair:
    """Returns new tokens ``(B, Hkv, n, D)`` with the padding of each row at its end."""
    if mask is None:
        return pair
    order = (~mask).int().argsort(dim=1, stable=True)[:, None, :, None]
    keys, values = (x.gather(2, order.expand_as(x)) for x in pair)
    return keys, values


def _windows_of_chunk(
    ring: Pair, new: Pair, mask: Tensor | None, lengths: Tensor, window: int
) -> Pair:
    """Returns keys and values of ``window - 1`` tokens before a chunk, and of the chunk."""
    if window == 0:
        return ring  # no tokens
    before = lengths[:, None] + torch.arange(1 - window, 0, device=lengths.device)
    index = (before.clamp(min=0) % (ring[0].shape[2] - 1)).long()[:, None, :, None]
    keys, values = (
        torch.cat([x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), y], 2)
        for x, y in zip(ring, _real_first(new, mask), strict=True)
    )
    return keys, values


def _append_to_ring(
    branches: BranchTensors, new: BranchTensors, positions: Tensor, lengths: Tensor
) -> None:
    """Replaces the oldest keys and values of the window branch, given the new lengths."""
    entries = branches.k_win.shape[2] - 1
    is_last = (positions >= 0) & (positions >= lengths[:, None] - entries)
    index = torch.where(is_last, positions % entries, entries).long()[:, None, :, None]
    for cached, x in ((branches.k_win, new.k_win), (branches.v_win, new.v_win)):
        cached.scatter_(2, index.expand_as(x), x)


def _append_compressed(
    state: CacheState, new: Pair, count: Tensor, sizes: NsaSizes, compress: Compress
) -> None:
    """Compresses the blocks that ``count (B,)`` new tokens of each row fill."""
    cmp_block, stride = sizes.cmp_block, sizes.cmp_stride
    n, device = new[0].shape[2], count.device
    inputs = [torch.cat(pair, 2) for pair in zip(state.tail, new, strict=True)]
    lengths = state.lengths[:, None]
    first = ((lengths - cmp_block + stride) // stride).clamp(min=0)
    block = first + torch.arange(n // stride + 1, device=device)
    # The first token of the first block among the inputs, of which the tail comes first.
    start = first * stride - lengths + cmp_block - 1
    index = start + torch.arange(n // stride * stride + cmp_block, device=device)
    index = index.clamp(max=inputs[0].shape[2] - 1)[:, None, :, None]
    k_blocks, v_blocks = (
        x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
        .unfold(2, cmp_block, stride)
        .permute(0, 2, 1, 4, 3)
        .flatten(0, 1)
        for x in inputs
    )
    compressed = compress(k_blocks, v_blocks, (block * stride).flatten())
    # Nothing reads a block that is not full. It is written again with its last token.
    k_cmp, v_cmp = state.branches.k_cmp, state.branches.v_cmp
    target = block.clamp(max=k_cmp.shape[2] - 1).long()[:, None, :, None]
    for cached, x in zip((k_cmp, v_cmp), compressed, strict=True):
        x = x.unflatten(0, block.shape)[:, :, :, 0].transpose(1, 2)
        cached.scatter_(2, target.expand_as(x), x.to(cached.dtype))
    last = count[:, None] + torch.arange(cmp_block - 1, device=device)
    last = last[:, None, :, None]
    for tail, x in zip(state.tail, inputs, strict=True):
        tail.copy_(x.gather(2, last.expand_as(tail)))
