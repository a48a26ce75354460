"""Adds new tokens to a cache: their positions, keys, values, and the means of filled blocks."""

import torch
from torch import Tensor

from flexmoba.cache.decode import MAX_STEP_QUERIES, has_kernels
from flexmoba.cache.options import NO_ROOM
from flexmoba.runtime import without_autocast


# An operator of its own, as inductor computes an expression of lengths anew wherever it is used:
# also after `append` has changed them.
@torch.library.custom_op("flexmoba::next_positions", mutates_args=())
def next_positions(lengths: Tensor, n: int, mask: Tensor | None) -> Tensor:
    """The positions of ``n`` new tokens of every row, ``(B, n)`` int32; -1 for padding."""
    if mask is None:
        return lengths[:, None] + torch.arange(n, device=lengths.device, dtype=torch.int32)
    return torch.where(mask, lengths[:, None] + mask.cumsum(1, dtype=torch.int32) - 1, -1)


@next_positions.register_fake
def _(lengths: Tensor, n: int, mask: Tensor | None) -> Tensor:
    return lengths.new_empty(lengths.shape[0], n)


@torch.library.custom_op(
    "flexmoba::append", mutates_args=("k_cache", "v_cache", "means", "lengths")
)
@without_autocast
def append(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Adds new keys and values, and the means of the blocks that they fill, in place.

    Returns:
        The position of each token, ``(B, n)`` int32; -1 for padding, `NO_ROOM` beyond the capacity.
    """
    if k.shape[2] <= MAX_STEP_QUERIES and mask is None and has_kernels(k, v):
        from flexmoba.cache.kernels import append_on_cuda

        return append_on_cuda(k_cache, v_cache, means, lengths, k, v)
    return append_scattered(k_cache, v_cache, means, lengths, k, v, mask)


def append_scattered(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`append` by plain tensor operations."""
    n_blocks, n = means.shape[2], k.shape[2]
    block_size = k_cache.shape[2] // n_blocks
    spare = (n_blocks - 1) * block_size
    before = lengths.clone()
    positions = next_positions(before, n, mask)
    lengths += n if mask is None else mask.sum(1, dtype=torch.int32)
    fits = (positions >= 0) & (positions < spare)
    at = torch.where(fits, positions, spare).long()[:, None, :, None]
    k_cache.scatter_(2, at.expand_as(k), k)
    v_cache.scatter_(2, at.expand_as(v), v)
    positions = torch.where(positions < spare, positions, NO_ROOM)

    # The blocks that these tokens may have filled.
    block = before[:, None] // block_size + torch.arange(n // block_size + 1, device=k.device)
    full = ((block + 1) * block_size <= lengths[:, None]) & (block < n_blocks - 1)
    block = torch.where(full, block, n_blocks - 1)
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    precise = torch.promote_types(k.dtype, torch.float32)
    filled = k_cache.unflatten(2, (n_blocks, block_size))[row, :, block]
    means[row, :, block] = filled.mean(3, dtype=precise).to(k.dtype)
    return positions


@append.register_fake
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    return lengths.new_empty(k.shape[0], k.shape[2])
