"""Triton kernels of attention over a shared selection.

`flexmoba.backends.fused.kernel_parts` defines the terms and sizes. Here a *pair* is a token of a KV
head and one column of its selection, ``(kv_head * q_len + token) * COUNT + column``. ROWS is the
number of rows of a matrix product: the GROUP query heads of a token, padded, or in the gradients of
keys the query heads of several tokens.
"""

import triton
import triton.language as tl

from flexmoba.backends.fused.kernel_parts import (
    LN_2,
    LOG2_E,
    add_key_grads,
    add_query_grads,
    add_visible_keys,
    head_offset,
    key_tile,
    load_rows,
    rows_of_item,
    store_rows,
)
from flexmoba.runtime.triton_launch import kernel


@triton.jit
def group_rows(
    kv_head, kv_heads, query, stride_b, stride_h,
    STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Returns the offsets of the query heads of a token; rows beyond the group repeat the last."""
    row = tl.minimum(tl.arange(0, ROWS), GROUP - 1).to(tl.int64)
    first = head_offset(kv_head, kv_heads, stride_b, stride_h * GROUP, UNIT)
    return first + row * stride_h * UNIT + query.to(tl.int64) * STRIDE


@triton.jit
def flat_rows(kv_head, query, q_len, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Returns the flat queries of a token's heads, and which rows are heads."""
    row = tl.arange(0, ROWS)
    head = kv_head.to(tl.int64) * GROUP + tl.minimum(row, GROUP - 1)
    return head * q_len + query, row < GROUP


@triton.jit
def selected_keys(
    selected_ptr, pair, step, position, kv_len,
    IS_CAUSAL: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns the keys of a tile of a selected block, and which of them the token sees.

    Keys that it does not see are clamped to the last one that it sees, so that their values,
    which get weights of 0, are not NaN.
    """
    tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    block = tl.load(selected_ptr + pair + step // tiles)
    start = block * BLOCK_SIZE
    end = tl.minimum(start + BLOCK_SIZE, kv_len)
    if IS_CAUSAL:
        end = tl.minimum(end, position + 1)
    end = tl.where(block >= 0, end, start)
    key = start + step % tiles * KEYS + tl.arange(0, KEYS)
    return tl.maximum(tl.minimum(key, end - 1), 0).to(tl.int64), (key < end)[None, :]


@kernel
def attend_kernel(
    q_ptr, k_ptr, v_ptr, selected_ptr, out_ptr, lse_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64,
    kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, factor: tl.float32,
    IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the attention of the query heads of a token."""
    kv_head, query = tl.program_id(0) // q_len, tl.program_id(0) % q_len
    offset = group_rows(
        kv_head, kv_heads, query, q_stride_b, q_stride_h, Q_STRIDE, UNIT, GROUP, ROWS
    )
    q = load_rows(q_ptr, offset, DIM, TILE_DIM)
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    position = query + kv_len - q_len
    pair = tl.program_id(0).to(tl.int64) * COUNT
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, TILE_VALUE_DIM], tl.float32)
    tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    for step in range(COUNT * tiles):
        key, visible = selected_keys(
            selected_ptr, pair, step, position, kv_len, IS_CAUSAL, BLOCK_SIZE, KEYS
        )
        k = load_rows(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
        v = load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
        highest, total, out = add_visible_keys(q, k, v, visible, highest, total, out, factor)
    out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    row, valid = flat_rows(kv_head, query, q_len, GROUP, ROWS)
    store_rows(out_ptr, row * VALUE_DIM, valid, out, VALUE_DIM, TILE_VALUE_DIM)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(lse_ptr + row, (base + tl.log2(total)) * LN_2, mask=valid)


@kernel
def query_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, grad_lse_ptr, selected_ptr,
    d_q_ptr, delta_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, factor: tl.float32, scale: tl.float32,
    IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the query heads of a token, and writes their ``delta``.

    ``delta`` is ``<grad, out> - grad_lse``, a term of the gradients of scores.
    """
    kv_head, query = tl.program_id(0) // q_len, tl.program_id(0) % q_len
    offset = group_rows(
        kv_head, kv_heads, query, q_stride_b, q_stride_h, Q_STRIDE, UNIT, GROUP, ROWS
    )
    q = load_rows(q_ptr, offset, DIM, TILE_DIM)
    offset = group_rows(
        kv_head, kv_heads, query, grad_stride_b, grad_stride_h, GRAD_STRIDE, UNIT, GROUP, ROWS
    )
    grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    row, valid = flat_rows(kv_head, query, q_len, GROUP, ROWS)
    out = load_rows(out_ptr, row * VALUE_DIM, VALUE_DIM, TILE_VALUE_DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row)
    tl.store(delta_ptr + row, delta, mask=valid)
    lse = tl.load(lse_ptr + row) * LOG2_E
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    position = query + kv_len - q_len
    pair = tl.program_id(0).to(tl.int64) * COUNT
    d_q = tl.zeros([ROWS, TILE_DIM], tl.float32)
    tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    for step in range(COUNT * tiles):
        key, visible = selected_keys(
            selected_ptr, pair, step, position, kv_len, IS_CAUSAL, BLOCK_SIZE, KEYS
        )
        k = load_rows(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
        v = load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
        d_q = add_query_grads(q, k, v, grad, lse, delta, visible, d_q, factor, True)
    store_rows(d_q_ptr, row * DIM, valid, d_q * scale, DIM, TILE_DIM)


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
    q = load_rows(q_ptr, offset, DIM, TILE_DIM)
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
    k = load_rows(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
    v = load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
    q_ptr += head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
    grad_ptr += head_offset(kv_head, kv_heads, grad_stride_b, grad_stride_h * GROUP, UNIT)
    d_k = tl.zeros([KEYS, TILE_DIM], tl.float32)
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
        store_rows(d_k_ptr, offset * DIM, real, d_k * scale, DIM, TILE_DIM)
        store_rows(d_v_ptr, offset * VALUE_DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)
    else:
        buffer = tl.load(first_extra_ptr + block) + item - tl.load(first_item_ptr + block)
        offset = (buffer.to(tl.int64) * BLOCK_SIZE + key - block_key) * (DIM + VALUE_DIM)
        store_rows(extra_ptr, offset, real, d_k, DIM, TILE_DIM)
        store_rows(extra_ptr, offset + DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)
