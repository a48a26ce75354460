"""The Triton kernel of the gradients of keys of attention over a shared selection.

`flexmoba.backends.fused.kernel_parts` defines the terms and sizes. Here a *pair* is a token of a KV
head and one column of its selection, ``(kv_head * q_len + token) * COUNT + column``. The ROWS of a
matrix product are the query heads of several tokens.
"""

import triton
import triton.language as tl

from flexmoba.backends.fused.kernel_parts import (
    LOG2_E,
    add_key_grads,
    head_offset,
    key_tile,
    load_parts,
    load_rows,
    rows_of_item,
    scale_parts,
    store_parts,
    store_rows,
    zero_parts,
)
from flexmoba.runtime.triton_launch import kernel


@triton.jit
def first_pair_from(pair_ptr, begin, end, token, COUNT: tl.constexpr):
    """Returns the index of the first pair whose token, over all KV heads, is at least ``token``."""
    while begin < end:
        middle = (begin + end) // 2
        if tl.load(pair_ptr + middle) // COUNT < token:
            begin = middle + 1
        else:
            end = middle
    return begin


@triton.jit
def add_tokens(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, pair_ptr, k, v, key, kv_head, q_len, kv_len,
    q_stride_h, grad_stride_h, begin, end, start, d_k, d_v, factor,
    GROUP: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of a tile of query heads of tokens to the gradients of keys.

    The rows are the query heads of the tokens of the pairs from ``begin`` to ``end``; ``start`` is
    the first row.
    """
    n_rows = (end - begin) * GROUP
    row = start + tl.arange(0, ROWS)
    valid = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    head = row % GROUP
    query = tl.load(pair_ptr + begin + row // GROUP) // COUNT - kv_head * q_len
    token = query.to(tl.int64)
    offset = head * q_stride_h * UNIT + token * Q_STRIDE
    q = load_parts(q_ptr, offset, DIM, TILE_DIM)
    offset = head * grad_stride_h * UNIT + token * GRAD_STRIDE
    grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    flat = (kv_head.to(tl.int64) * GROUP + head) * q_len + token
    # Repetitions of a clamped row get weight 0.
    lse = tl.where(valid, tl.load(lse_ptr + flat) * LOG2_E, float("inf"))
    delta = tl.load(delta_ptr + flat)
    visible = key[:, None] <= (query + kv_len - q_len)[None, :]
    d_k, d_v, _ = add_key_grads(q, k, v, grad, lse, delta, visible, d_k, d_v, factor, MASKED)
    return d_k, d_v


@kernel
def key_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr, extra_ptr,
    pair_ptr, first_row_ptr, first_item_ptr, block_of_item_ptr, first_extra_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    all_blocks: tl.int32, kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32,
    n_blocks: tl.int32, factor: tl.float32, scale: tl.float32, item_rows: tl.int32,
    IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a tile of keys from the tokens of an item.

    If a block has several items, each writes its sum to ``extra``, in float32.
    """
    tiles_per_block: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    item = tl.program_id(0) // tiles_per_block
    if item >= tl.load(first_item_ptr + all_blocks):
        return
    block = tl.load(block_of_item_ptr + item)
    begin, end = rows_of_item(item, block, n_blocks, first_row_ptr, first_item_ptr, item_rows)
    kv_head = block // n_blocks
    block_key = block % n_blocks * BLOCK_SIZE
    block_end = tl.minimum(block_key + BLOCK_SIZE, kv_len)
    key, real_key = key_tile(block_key + tl.program_id(0) % tiles_per_block * KEYS, block_end, KEYS)
    real = key < block_end
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    k = load_parts(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
    v = load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
    q_ptr += head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
    grad_ptr += head_offset(kv_head, kv_heads, grad_stride_b, grad_stride_h * GROUP, UNIT)
    d_k = zero_parts(KEYS, TILE_DIM)
    d_v = tl.zeros([KEYS, TILE_VALUE_DIM], tl.float32)
    # Tokens of a block ascend. Those from its last key on see all keys, and a mask takes registers.
    middle = begin
    if IS_CAUSAL:
        middle = first_pair_from(
            pair_ptr, begin, end, kv_head * q_len + block_end - 1 - (kv_len - q_len), COUNT
        )
        for start in range(0, (middle - begin) * GROUP, ROWS):
            d_k, d_v = add_tokens(
                q_ptr, grad_ptr, lse_ptr, delta_ptr, pair_ptr, k, v, key, kv_head, q_len, kv_len,
                q_stride_h, grad_stride_h, begin, middle, start, d_k, d_v, factor,
                GROUP, COUNT, ROWS, DIM, TILE_DIM, VALUE_DIM, TILE_VALUE_DIM,
                Q_STRIDE, GRAD_STRIDE, UNIT, True,
            )  # fmt: skip
    for start in range(0, (end - middle) * GROUP, ROWS):
        d_k, d_v = add_tokens(
            q_ptr, grad_ptr, lse_ptr, delta_ptr, pair_ptr, k, v, key, kv_head, q_len, kv_len,
            q_stride_h, grad_stride_h, middle, end, start, d_k, d_v, factor,
            GROUP, COUNT, ROWS, DIM, TILE_DIM, VALUE_DIM, TILE_VALUE_DIM,
            Q_STRIDE, GRAD_STRIDE, UNIT, False,
        )  # fmt: skip
    if tl.load(first_item_ptr + block + 1) - tl.load(first_item_ptr + block) == 1:
        offset = kv_head.to(tl.int64) * kv_len + key
        store_parts(d_k_ptr, offset * DIM, real, scale_parts(d_k, scale), DIM, TILE_DIM)
        store_rows(d_v_ptr, offset * VALUE_DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)
    else:
        buffer = tl.load(first_extra_ptr + block) + item - tl.load(first_item_ptr + block)
        offset = (buffer.to(tl.int64) * BLOCK_SIZE + key - block_key) * (DIM + VALUE_DIM)
        store_parts(extra_ptr, offset, real, d_k, DIM, TILE_DIM)
        store_rows(extra_ptr, offset + DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)
