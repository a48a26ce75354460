"""Operators that append tokens to a cache and compute mean keys of sub-blocks that become full."""

from typing import Any

import torch
from torch import Tensor

from flexmoba.cache.decode import MAX_STEP_QUERIES, has_kernels
from flexmoba.cache.options import NO_ROOM
from flexmoba.runtime import is_plain_call, without_autocast


# A separate operator, because inductor may recompute an expression of `lengths` at each use, also
# after `append` has changed `lengths`.
@torch.library.custom_op("flexmoba::next_positions", mutates_args=())
def next_positions(lengths: Tensor, n: int, mask: Tensor | None) -> Tensor:
    """Returns the positions of ``n`` new tokens per row, ``(B, n)`` int32; -1 for padding.

    Args:
        lengths: Tokens in each row of the cache, ``(B,)`` int32.
        n: New tokens of every row.
        mask: ``(B, n)`` bool, False for padding; None if there is no padding.
    """
    if mask is None:
        return lengths[:, None] + torch.arange(n, device=lengths.device, dtype=torch.int32)
    return torch.where(mask, lengths[:, None] + mask.cumsum(1, dtype=torch.int32) - 1, -1)


@next_positions.register_fake
def _(lengths: Tensor, n: int, mask: Tensor | None) -> Tensor:
    return lengths.new_empty(lengths.shape[0], n)


@without_autocast
def _append_here(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sub_blocks: int,
) -> Tensor:
    if k.shape[2] <= MAX_STEP_QUERIES and mask is None and has_kernels(k, v):
        from flexmoba.cache.append_kernels import append_on_cuda

        return append_on_cuda(k_cache, v_cache, means, lengths, k, v, sub_blocks)
    return append_scattered(k_cache, v_cache, means, lengths, k, v, mask, sub_blocks)


_append = torch.library.custom_op(
    "flexmoba::append", _append_here, mutates_args=("k_cache", "v_cache", "means", "lengths")
)


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sub_blocks: int,
) -> Tensor:
    """Appends keys and values, and the mean keys of the sub-blocks that they fill, in place.

    Args:
        k_cache: Keys of the cache, ``(B, Hkv, N * block_size, D)``.
        v_cache: Values of the cache, ``(B, Hkv, N * block_size, Dv)``.
        means: Mean keys of the cache, ``(B, Hkv, N * sub_blocks, D)``.
        lengths: Tokens in each row, ``(B,)`` int32.
        k: New keys, ``(B, Hkv, n, D)``.
        v: New values, ``(B, Hkv, n, Dv)``.
        mask: ``(B, n)`` bool, False for padding; None if there is no padding.
        sub_blocks: Number of sub-blocks in a block.

    Returns:
        The position of each token, ``(B, n)`` int32; -1 for padding, `NO_ROOM` beyond the capacity.
    """
    # With gradients, autograd must know of the changes in place.
    plain = not torch.is_grad_enabled() and is_plain_call(k_cache, k)
    run: Any = _append_here if plain else _append
    positions: Tensor = run(k_cache, v_cache, means, lengths, k, v, mask, sub_blocks)
    return positions


def append_scattered(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sub_blocks: int,
) -> Tensor:
    """Computes `append` by plain tensor operations."""
    n_means, n = means.shape[2], k.shape[2]
    size = k_cache.shape[2] // n_means
    n_readable = n_means - sub_blocks  # the last block takes writes that nothing reads
    capacity = n_readable * size
    old_lengths = lengths.clone()
    positions = next_positions(old_lengths, n, mask)
    lengths += n if mask is None else mask.sum(1, dtype=torch.int32)
    fits = (positions >= 0) & (positions < capacity)
    index = torch.where(fits, positions, capacity).long()[:, None, :, None]
    k_cache.scatter_(2, index.expand_as(k), k)
    v_cache.scatter_(2, index.expand_as(v), v)
    positions = torch.where(positions < capacity, positions, NO_ROOM)

    # The sub-blocks that the new tokens may have filled. The mean of a sub-block that is not full
    # goes to the last block, since only the device knows the number of full sub-blocks.
    index = old_lengths[:, None] // size + torch.arange(n // size + 1, device=k.device)
    is_full = ((index + 1) * size <= lengths[:, None]) & (index < n_readable)
    index = torch.where(is_full, index, n_means - 1)
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    precise = torch.promote_types(k.dtype, torch.float32)
    keys = k_cache.unflatten(2, (n_means, size))[row, :, index]
    means[row, :, index] = keys.mean(3, dtype=precise).to(k.dtype)
    return positions


@_append.register_fake
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sub_blocks: int,
) -> Tensor:
    return lengths.new_empty(k.shape[0], k.shape[2])
