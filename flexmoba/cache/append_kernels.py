"""The Triton kernel that appends a few tokens to a cache."""

import torch
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import next_power_of_2
from flexmoba.cache.options import NO_ROOM
from flexmoba.runtime.triton_launch import kernel, launch, packed

_NO_ROOM = tl.constexpr(NO_ROOM)


def append_on_cuda(
    k_cache: Tensor,
    v_cache: Tensor,
    means: Tensor,
    lengths: Tensor,
    k: Tensor,
    v: Tensor,
    sub_blocks: int,
) -> Tensor:
    """Computes `flexmoba.cache.append.append` of a few tokens without padding, in one launch.

    Tokens beyond the capacity, which excludes the last block, are not written.

    Returns:
        The positions of the tokens, ``(B, n)`` int32; `NO_ROOM` beyond the capacity.
    """
    batch, kv_heads, n, dim = k.shape
    n_means, value_dim = means.shape[2], v.shape[3]
    positions = lengths.new_empty(batch, n)
    constants = {
        "N": n,
        "SUB_BLOCKS": sub_blocks,
        "SUB_BLOCK_SIZE": k_cache.shape[2] // n_means,
        "KEYS": 64,
        "DIM": dim,
        "TILE_D": max(16, next_power_of_2(dim)),
        "VALUE_DIM": value_dim,
        "TILE_VALUE_D": max(16, next_power_of_2(value_dim)),
        "num_warps": 4,
    }
    with torch.cuda.device_of(k):
        tensors = (k_cache, v_cache, means, lengths, packed(k), packed(v), positions)
        launch(
            _append_kernel, batch * kv_heads, (*tensors, kv_heads, n_means), constants, (k.dtype,)
        )
    lengths += n
    return positions


@kernel
def _append_kernel(
    k_cache_ptr, v_cache_ptr, means_ptr, lengths_ptr, k_ptr, v_ptr, positions_ptr,
    kv_heads: tl.int32, n_means: tl.int32,
    N: tl.constexpr, SUB_BLOCKS: tl.constexpr, SUB_BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Writes the new tokens of one KV head, and the mean keys of the sub-blocks that they fill."""
    head = tl.program_id(0).to(tl.int64)  # b * Hkv + KV head
    length = tl.load(lengths_ptr + head // kv_heads)
    capacity = (n_means - SUB_BLOCKS) * SUB_BLOCK_SIZE  # the last block stays empty
    dim, value_dim = tl.arange(0, TILE_D), tl.arange(0, TILE_VALUE_D)
    first = head * (n_means * SUB_BLOCK_SIZE)
    for i in range(N):
        position = length + i
        k = tl.load(k_ptr + (head * N + i) * DIM + dim, mask=dim < DIM)
        v = tl.load(v_ptr + (head * N + i) * VALUE_DIM + value_dim, mask=value_dim < VALUE_DIM)
        if position < capacity:
            token = first + position
            tl.store(k_cache_ptr + token * DIM + dim, k, mask=dim < DIM)
            tl.store(v_cache_ptr + token * VALUE_DIM + value_dim, v, mask=value_dim < VALUE_DIM)
        if head % kv_heads == 0:
            stored_position = tl.where(position < capacity, position, _NO_ROOM)
            tl.store(positions_ptr + head // kv_heads * N + i, stored_position)
    tl.debug_barrier()  # the means read keys that other threads wrote
    end = tl.minimum((length + N) // SUB_BLOCK_SIZE, n_means - SUB_BLOCKS)
    for index in range(length // SUB_BLOCK_SIZE, end):
        total = tl.zeros([TILE_D], tl.float32)
        for start in range(0, SUB_BLOCK_SIZE, KEYS):
            key = start + tl.arange(0, KEYS)
            token = first + index * SUB_BLOCK_SIZE + key
            mask = (key < SUB_BLOCK_SIZE)[:, None] & (dim < DIM)[None, :]
            x = tl.load(k_cache_ptr + token[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
            total += tl.sum(x.to(tl.float32), 0)
        mean = (total / SUB_BLOCK_SIZE).to(means_ptr.dtype.element_ty)
        tl.store(means_ptr + (head * n_means + index) * DIM + dim, mean, mask=dim < DIM)
