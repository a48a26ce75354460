"""Triton kernels that append the tokens of a step, before and after the compression.

`append_kernel` writes the keys and values of the selected and the window branch, copies the inputs
of the compressed blocks that the tokens may fill, and shifts the tail. `store_kernel` writes the
results of the compression, and the new lengths.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import next_power_of_2
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors, CacheState, Compress
from flexmoba.runtime.triton_launch import aligned, kernel, launch, packed

_ROWS = 32  # tokens of a tile


def append_on_cuda(
    state: CacheState, new: BranchTensors, sizes: NsaSizes, compress: Compress | None
) -> Tensor:
    """Computes `append` for a few tokens without padding; returns their positions.

    ``compress`` is None for means, which `store_kernel` computes itself.
    """
    branches, tail, lengths = state
    batch, kv_heads, n, dim = new.k.shape
    value_dim, n_blocks = new.v.shape[3], n // sizes.cmp_stride + 1
    positions, starts = (lengths.new_empty(batch, x) for x in (n, n_blocks))
    k_blocks, v_blocks = (
        x.new_empty(batch * n_blocks, kv_heads, sizes.cmp_block, x.shape[3]) for x in (new.k, new.v)
    )
    new = BranchTensors(*(aligned(x) for x in new))
    strides = [x.stride(i) for x in new for i in range(3)]
    constants: dict[str, Any] = {
        "MEANS": compress is None,
        "N": n,
        "BLOCKS": n_blocks,
        "CMP_BLOCK": sizes.cmp_block,
        "STRIDE": sizes.cmp_stride,
        "BLOCK_SIZE": sizes.block_size,
        "RING": branches.k_win.shape[2] - 1,
        "ROWS": _ROWS,
        "DIM": dim,
        "TILE_D": next_power_of_2(dim),
        "VALUE_DIM": value_dim,
        "TILE_VALUE_D": next_power_of_2(value_dim),
        "num_warps": 4,
    }
    programs = batch * kv_heads
    with torch.cuda.device_of(new.k):
        launch(
            append_kernel,
            programs,
            (
                *(branches.k, branches.v, branches.k_win, branches.v_win, *tail, lengths),
                *(*new, positions, starts, k_blocks, v_blocks, *strides),
                *(kv_heads, branches.k.shape[2]),
            ),
            constants,
            (new.k.dtype,),
        )
        k_new, v_new = k_blocks, v_blocks
        if compress is not None:
            k_new, v_new = (packed(x) for x in compress(k_blocks, v_blocks, starts.flatten()))
        launch(
            store_kernel,
            programs,
            (
                *(branches.k_cmp, branches.v_cmp, k_new, v_new, starts, lengths),
                *(kv_heads, branches.k_cmp.shape[2]),
            ),
            constants,
            (new.k.dtype, k_new.dtype, v_new.dtype),
        )
    return positions


@triton.jit
def _copy_row(source_ptr, source, target_ptr, target, DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Copies the features of one token from the offset ``source`` to the row ``target``."""
    dim = tl.arange(0, TILE_D)
    x = tl.load(source_ptr + source + dim, mask=dim < DIM)
    tl.store(target_ptr + target * DIM + dim, x.to(target_ptr.dtype.element_ty), mask=dim < DIM)


@triton.jit
def _store_mean(
    block_ptr, block, target_ptr, target,
    CMP_BLOCK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Writes the mean of the tokens of a compressed block to the row ``target``."""
    dim = tl.arange(0, TILE_D)
    total = tl.zeros([TILE_D], tl.float32)
    for first in range(0, CMP_BLOCK, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < CMP_BLOCK)[:, None] & (dim < DIM)[None, :]
        offset = (block * CMP_BLOCK + row)[:, None] * DIM + dim[None, :]
        total += tl.sum(tl.load(block_ptr + offset, mask=mask, other=0.0).to(tl.float32), 0)
    mean = (total / CMP_BLOCK).to(target_ptr.dtype.element_ty)
    tl.store(target_ptr + target * DIM + dim, mean, mask=dim < DIM)


@triton.jit
def _load_inputs(
    tail_ptr, new_ptr, new_stride, head, index, N: tl.constexpr, TAIL: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Loads inputs of the compression: of the tail, and then of the new tokens of the head."""
    dim = tl.arange(0, TILE_D)
    index = tl.minimum(index, TAIL + N - 1)
    is_old, in_dim = (index < TAIL)[:, None], (dim < DIM)[None, :]
    row = (head * TAIL + index)[:, None]
    old = tl.load(tail_ptr + row * DIM + dim[None, :], mask=is_old & in_dim, other=0.0)
    offset = (index - TAIL).to(tl.int64)[:, None] * new_stride
    new = tl.load(new_ptr + offset + dim[None, :], mask=(is_old == 0) & in_dim, other=0.0)
    return tl.where(is_old, old, new)


@triton.jit
def _copy_blocks(
    tail_ptr, new_ptr, new_stride, blocks_ptr, head, block, kv_heads, offset,
    N: tl.constexpr, BLOCKS: tl.constexpr, CMP_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Copies the inputs of a compressed block, which begin at ``offset``."""
    dim = tl.arange(0, TILE_D)
    target = ((head // kv_heads * BLOCKS + block) * kv_heads + head % kv_heads) * CMP_BLOCK
    for first in range(0, CMP_BLOCK, ROWS):
        row = first + tl.arange(0, ROWS)
        x = _load_inputs(
            tail_ptr, new_ptr, new_stride, head, offset + row, N, CMP_BLOCK - 1, DIM, TILE_D
        )
        mask = (row < CMP_BLOCK)[:, None] & (dim < DIM)[None, :]
        tl.store(blocks_ptr + (target + row)[:, None] * DIM + dim[None, :], x, mask=mask)


@triton.jit
def _shift_tail(
    tail_ptr, new_ptr, new_stride, head, N: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Shifts the tail by the new tokens, a tile at a time, from its first token on."""
    dim = tl.arange(0, TILE_D)
    for first in range(0, TAIL, ROWS):
        row = first + tl.arange(0, ROWS)
        x = _load_inputs(tail_ptr, new_ptr, new_stride, head, row + N, N, TAIL, DIM, TILE_D)
        tl.debug_barrier()  # other threads have read the rows that this tile replaces
        mask = (row < TAIL)[:, None] & (dim < DIM)[None, :]
        tl.store(tail_ptr + (head * TAIL + row)[:, None] * DIM + dim[None, :], x, mask=mask)
        tl.debug_barrier()


@kernel
def append_kernel(
    k_ptr, v_ptr, k_win_ptr, v_win_ptr, k_tail_ptr, v_tail_ptr, lengths_ptr,
    new_k_ptr, new_v_ptr, new_k_cmp_ptr, new_v_cmp_ptr, new_k_win_ptr, new_v_win_ptr,
    positions_ptr, starts_ptr, k_blocks_ptr, v_blocks_ptr,
    k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride: tl.int64,
    k_cmp_stride_b: tl.int64, k_cmp_stride_h: tl.int64, k_cmp_stride: tl.int64,
    v_cmp_stride_b: tl.int64, v_cmp_stride_h: tl.int64, v_cmp_stride: tl.int64,
    k_win_stride_b: tl.int64, k_win_stride_h: tl.int64, k_win_stride: tl.int64,
    v_win_stride_b: tl.int64, v_win_stride_h: tl.int64, v_win_stride: tl.int64,
    kv_heads: tl.int32, kv_len: tl.int32,
    N: tl.constexpr, BLOCKS: tl.constexpr, CMP_BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Appends the tokens of one KV head."""
    head = tl.program_id(0).to(tl.int64)  # b * Hkv + KV head
    batch, kv_head = head // kv_heads, head % kv_heads
    new_k_ptr += batch * k_stride_b + kv_head * k_stride_h
    new_v_ptr += batch * v_stride_b + kv_head * v_stride_h
    new_k_cmp_ptr += batch * k_cmp_stride_b + kv_head * k_cmp_stride_h
    new_v_cmp_ptr += batch * v_cmp_stride_b + kv_head * v_cmp_stride_h
    new_k_win_ptr += batch * k_win_stride_b + kv_head * k_win_stride_h
    new_v_win_ptr += batch * v_win_stride_b + kv_head * v_win_stride_h
    length = tl.load(lengths_ptr + batch)
    for i in range(N):
        position = length + i
        if position < kv_len - BLOCK_SIZE:
            target = head * kv_len + position
            _copy_row(new_k_ptr, i * k_stride, k_ptr, target, DIM, TILE_D)
            _copy_row(new_v_ptr, i * v_stride, v_ptr, target, VALUE_DIM, TILE_VALUE_D)
        if RING > 0:
            target = head * (RING + 1) + position % RING
            _copy_row(new_k_win_ptr, i * k_win_stride, k_win_ptr, target, DIM, TILE_D)
            _copy_row(new_v_win_ptr, i * v_win_stride, v_win_ptr, target, VALUE_DIM, TILE_VALUE_D)
        if head % kv_heads == 0:
            tl.store(positions_ptr + batch * N + i, position)
    block = tl.maximum((length - CMP_BLOCK + STRIDE) // STRIDE, 0)
    for i in range(BLOCKS):
        start = (block + i) * STRIDE
        offset = start - length + CMP_BLOCK - 1
        _copy_blocks(
            k_tail_ptr, new_k_cmp_ptr, k_cmp_stride, k_blocks_ptr, head, i, kv_heads, offset,
            N, BLOCKS, CMP_BLOCK, ROWS, DIM, TILE_D,
        )  # fmt: skip
        _copy_blocks(
            v_tail_ptr, new_v_cmp_ptr, v_cmp_stride, v_blocks_ptr, head, i, kv_heads, offset,
            N, BLOCKS, CMP_BLOCK, ROWS, VALUE_DIM, TILE_VALUE_D,
        )  # fmt: skip
        if head % kv_heads == 0:
            tl.store(starts_ptr + batch * BLOCKS + i, start)
    _shift_tail(k_tail_ptr, new_k_cmp_ptr, k_cmp_stride, head, N, CMP_BLOCK - 1, ROWS, DIM, TILE_D)
    _shift_tail(
        v_tail_ptr, new_v_cmp_ptr, v_cmp_stride, head, N, CMP_BLOCK - 1, ROWS,
        VALUE_DIM, TILE_VALUE_D,
    )  # fmt: skip


@kernel
def store_kernel(
    k_cmp_ptr, v_cmp_ptr, new_k_ptr, new_v_ptr, starts_ptr, lengths_ptr,
    kv_heads: tl.int32, n_compressed: tl.int32,
    N: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr,
    MEANS: tl.constexpr, CMP_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Writes the compressed keys and values of one KV head, or the means of the copied blocks.

    Nothing reads a block that is not full. It is written again with its last token.
    """
    head = tl.program_id(0).to(tl.int64)
    batch = head // kv_heads
    for i in range(BLOCKS):
        block = tl.load(starts_ptr + batch * BLOCKS + i) // STRIDE
        target = head * n_compressed + tl.minimum(block, n_compressed - 1)
        source = (batch * BLOCKS + i) * kv_heads + head % kv_heads
        if MEANS:
            _store_mean(new_k_ptr, source, k_cmp_ptr, target, CMP_BLOCK, ROWS, DIM, TILE_D)
            _store_mean(
                new_v_ptr, source, v_cmp_ptr, target, CMP_BLOCK, ROWS, VALUE_DIM, TILE_VALUE_D
            )
        else:
            _copy_row(new_k_ptr, source * DIM, k_cmp_ptr, target, DIM, TILE_D)
            _copy_row(new_v_ptr, source * VALUE_DIM, v_cmp_ptr, target, VALUE_DIM, TILE_VALUE_D)
    if head % kv_heads == 0:
        tl.store(lengths_ptr + batch, tl.load(lengths_ptr + batch) + N)
