"""Triton kernels of the backward pass.

`kernel_parts` defines the terms and sizes.
"""

import triton.language as tl

from flexmoba.backends.fused.kernel_parts import (
    LOG2_E,
    add_dots,
    add_key_grads,
    add_parts,
    add_query_grads,
    clamped_pairs,
    head_offset,
    keep_rows,
    key_tile,
    load_parts,
    load_rows,
    own_range,
    query_tile_rows,
    rows_of_item,
    rows_offset,
    scale_parts,
    sees_in_own_block,
    store_parts,
    store_rows,
    zero_parts,
)
from flexmoba.runtime.triton_launch import kernel


@kernel
def delta_kernel(
    grad_ptr, out_ptr, grad_lse_ptr, delta_ptr,
    grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    n_queries: tl.int32, q_len: tl.int32, heads: tl.int32,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Writes ``<grad, out> - grad_lse`` of every query, a term of the gradients of its scores."""
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = query < n_queries
    query = tl.minimum(query, n_queries - 1)
    head = query // q_len
    offset = head_offset(head, heads, grad_stride_b, grad_stride_h, UNIT)
    offset += (query - head * q_len).to(tl.int64) * GRAD_STRIDE
    grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    out_offset = query.to(tl.int64) * VALUE_DIM
    out = load_rows(out_ptr, out_offset, VALUE_DIM, TILE_VALUE_DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + query)
    tl.store(delta_ptr + query, delta, mask=valid)


@kernel
def key_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, own_ptr,
    d_k_ptr, d_v_ptr, extra_ptr, partial_ptr,
    pair_ptr, first_row_ptr, first_item_ptr, block_of_item_ptr, first_extra_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    first_query: tl.int32, first_kv_head: tl.int32, first_block: tl.int32, last_block: tl.int32,
    piece_pair: tl.int32, kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, n_blocks: tl.int32,
    factor: tl.float32, scale: tl.float32, item_rows: tl.int32,
    RAGGED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr, GROUP: tl.constexpr,
    COUNT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr, WRITES_QUERY_GRADS: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a tile of keys from the rows of an item.

    The first item of a block adds the queries whose own block it is. If a block has several items,
    each writes its sum to ``extra``, in float32. If one tile holds a block, the kernel can also
    write the gradient that each pair contributes to its query.
    """
    tiles_per_block: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    item = tl.load(first_item_ptr + first_block) + tl.program_id(0) // tiles_per_block
    if item >= tl.load(first_item_ptr + last_block):
        return
    block = tl.load(block_of_item_ptr + item)
    begin, end = rows_of_item(item, block, n_blocks, first_row_ptr, first_item_ptr, item_rows)
    kv_head = first_kv_head + block // n_blocks
    block_key = block % n_blocks * BLOCK_SIZE
    block_end = tl.minimum(block_key + BLOCK_SIZE, kv_len)
    first_key = block_key + tl.program_id(0) % tiles_per_block * KEYS
    key, real_key = key_tile(first_key, block_end, KEYS)
    real = key < block_end
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    k = load_parts(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
    v = load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
    q_ptr += head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
    grad_ptr += head_offset(kv_head, kv_heads, grad_stride_b, grad_stride_h * GROUP, UNIT)
    d_k = zero_parts(KEYS, TILE_DIM)
    d_v = tl.zeros([KEYS, TILE_VALUE_DIM], tl.float32)
    for start in range(begin, end, ROWS):
        pair, valid = clamped_pairs(pair_ptr, start, end, ROWS)
        query = first_query + pair // COUNT - kv_head * GROUP * q_len
        offset = rows_offset(query, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP)
        q = load_parts(q_ptr, offset, DIM, TILE_DIM)
        offset = rows_offset(query, q_len, grad_stride_h, GRAD_STRIDE, UNIT, GROUP)
        grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
        query += kv_head * GROUP * q_len
        # Repetitions of a clamped row get weight 0.
        lse = tl.where(valid, tl.load(lse_ptr + query) * LOG2_E, float("inf"))
        delta = tl.load(delta_ptr + query)
        d_k, d_v, d_scores = add_key_grads(
            q, k, v, grad, lse, delta, real[:, None], d_k, d_v, factor, RAGGED
        )
        if WRITES_QUERY_GRADS:
            d_q = add_dots(tl.trans(d_scores), k, zero_parts(ROWS, TILE_DIM))
            d_q = scale_parts(d_q, scale)
            partial = (pair - piece_pair).to(tl.int64) * DIM
            store_parts(partial_ptr, partial, valid, d_q, DIM, TILE_DIM)
    item_of_block = item - tl.load(first_item_ptr + block)
    if IS_CAUSAL:
        if item_of_block == 0:
            offset = kv_len - q_len
            for head_in_group in range(GROUP):
                for start in range(tl.maximum(first_key, offset), block_end, ROWS):
                    valid = start + tl.arange(0, ROWS) < block_end
                    position = tl.minimum(start + tl.arange(0, ROWS), block_end - 1)
                    query = head_in_group * q_len + position - offset
                    row_offset = rows_offset(query, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP)
                    q = load_parts(q_ptr, row_offset, DIM, TILE_DIM)
                    row_offset = rows_offset(query, q_len, grad_stride_h, GRAD_STRIDE, UNIT, GROUP)
                    grad = load_rows(grad_ptr, row_offset, VALUE_DIM, TILE_VALUE_DIM)
                    query += kv_head * GROUP * q_len
                    lse = tl.load(lse_ptr + query) * LOG2_E
                    delta = tl.load(delta_ptr + query)
                    if HAS_OWN:
                        valid = valid & (tl.load(own_ptr + query) != 0)
                    visible = valid[None, :] & (key[:, None] <= position[None, :])
                    d_k, d_v, _ = add_key_grads(
                        q, k, v, grad, lse, delta, visible, d_k, d_v, factor, True
                    )
    items = tl.load(first_item_ptr + block + 1) - tl.load(first_item_ptr + block)
    if items == 1:
        row_offset = kv_head.to(tl.int64) * kv_len + key
        store_parts(d_k_ptr, row_offset * DIM, real, scale_parts(d_k, scale), DIM, TILE_DIM)
        store_rows(d_v_ptr, row_offset * VALUE_DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)
    else:
        buffer = tl.load(first_extra_ptr + block) - tl.load(first_extra_ptr + first_block)
        buffer = (buffer + item_of_block).to(tl.int64)
        row_offset = (buffer * BLOCK_SIZE + key - block_key) * (DIM + VALUE_DIM)
        store_parts(extra_ptr, row_offset, real, d_k, DIM, TILE_DIM)
        store_rows(extra_ptr, row_offset + DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)


@kernel
def sum_extra_kernel(
    extra_ptr, d_k_ptr, d_v_ptr, first_item_ptr, first_extra_ptr,
    first_block: tl.int32, first_kv_head: tl.int32, kv_len: tl.int32, n_blocks: tl.int32,
    scale: tl.float32,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Adds the sums in ``extra`` of the items of a block, in their order."""
    tiles_per_block: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    block = first_block + tl.program_id(0) // tiles_per_block
    items = tl.load(first_item_ptr + block + 1) - tl.load(first_item_ptr + block)
    if items == 1:
        return
    block_key = block % n_blocks * BLOCK_SIZE
    key = block_key + tl.program_id(0) % tiles_per_block * KEYS + tl.arange(0, KEYS)
    real = key < tl.minimum(block_key + BLOCK_SIZE, kv_len)
    d_k = zero_parts(KEYS, TILE_DIM)
    d_v = tl.zeros([KEYS, TILE_VALUE_DIM], tl.float32)
    first_buffer = tl.load(first_extra_ptr + block) - tl.load(first_extra_ptr + first_block)
    first_buffer = first_buffer.to(tl.int64)
    for item in range(items):
        row_offset = (first_buffer + item) * BLOCK_SIZE + tl.minimum(
            key - block_key, BLOCK_SIZE - 1
        )
        offset = row_offset * (DIM + VALUE_DIM)
        d_k = add_parts(d_k, load_parts(extra_ptr, offset, DIM, TILE_DIM))
        d_v += load_rows(extra_ptr, offset + DIM, VALUE_DIM, TILE_VALUE_DIM)
    row_offset = (first_kv_head + block // n_blocks).to(tl.int64) * kv_len + key
    store_parts(d_k_ptr, row_offset * DIM, real, scale_parts(d_k, scale), DIM, TILE_DIM)
    store_rows(d_v_ptr, row_offset * VALUE_DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)


@kernel
def item_query_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, partial_ptr,
    pair_ptr, first_row_ptr, first_item_ptr, block_of_item_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    first_query: tl.int32, first_kv_head: tl.int32, first_block: tl.int32, last_block: tl.int32,
    piece_pair: tl.int32, kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, n_blocks: tl.int32,
    factor: tl.float32, scale: tl.float32,
    RAGGED: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients that ROWS pairs of a block contribute to their queries.

    The kernel serves blocks for which `key_grads_kernel` does not.
    """
    item = tl.load(first_item_ptr + first_block) + tl.program_id(0)
    if item >= tl.load(first_item_ptr + last_block):
        return
    block = tl.load(block_of_item_ptr + item)
    begin, end = rows_of_item(item, block, n_blocks, first_row_ptr, first_item_ptr, ROWS)
    kv_head = first_kv_head + block // n_blocks
    first_key = block % n_blocks * BLOCK_SIZE
    n_keys = tl.minimum(kv_len - first_key, BLOCK_SIZE)
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    k_ptr += first_key.to(tl.int64) * K_STRIDE
    v_ptr += first_key.to(tl.int64) * V_STRIDE
    q_ptr += head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
    grad_ptr += head_offset(kv_head, kv_heads, grad_stride_b, grad_stride_h * GROUP, UNIT)
    pair, valid = clamped_pairs(pair_ptr, begin, end, ROWS)
    query = first_query + pair // COUNT - kv_head * GROUP * q_len
    offset = rows_offset(query, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP)
    q = load_parts(q_ptr, offset, DIM, TILE_DIM)
    offset = rows_offset(query, q_len, grad_stride_h, GRAD_STRIDE, UNIT, GROUP)
    grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    query += kv_head * GROUP * q_len
    lse = tl.load(lse_ptr + query) * LOG2_E
    delta = tl.load(delta_ptr + query)
    d_q = zero_parts(ROWS, TILE_DIM)
    for start in range(0, BLOCK_SIZE, KEYS):
        visible = start + tl.arange(0, KEYS) < n_keys
        key = (start + tl.arange(0, KEYS)).to(tl.int64)
        if RAGGED:
            key = tl.minimum(key, n_keys - 1)
        k = load_parts(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
        v = load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
        d_q = add_query_grads(q, k, v, grad, lse, delta, visible[None, :], d_q, factor, RAGGED)
    partial = (pair - piece_pair).to(tl.int64) * DIM
    store_parts(partial_ptr, partial, valid, scale_parts(d_q, scale), DIM, TILE_DIM)


@kernel
def finish_query_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, partial_ptr, routed_ptr, own_ptr, d_q_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    first_tile: tl.int32, piece_query: tl.int32, heads: tl.int32, kv_heads: tl.int32,
    q_len: tl.int32, kv_len: tl.int32, factor: tl.float32, scale: tl.float32,
    IS_CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    TILE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a tile of queries from own blocks, and adds those of pairs."""
    head, first_row, row, valid = query_tile_rows(first_tile + tl.program_id(0), q_len, ROWS)
    query = head * q_len + row
    d_q = zero_parts(ROWS, TILE_DIM)
    if IS_CAUSAL:
        q_ptr += head_offset(head, heads, q_stride_b, q_stride_h, UNIT)
        q = load_parts(q_ptr, row.to(tl.int64) * Q_STRIDE, DIM, TILE_DIM)
        grad_ptr += head_offset(head, heads, grad_stride_b, grad_stride_h, UNIT)
        offset = row.to(tl.int64) * GRAD_STRIDE
        grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
        lse = tl.load(lse_ptr + query) * LOG2_E
        delta = tl.load(delta_ptr + query)
        kv_head = head // (heads // kv_heads)
        k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
        v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
        position = row + kv_len - q_len
        first_key, full_end, last_position = own_range(
            first_row, q_len, kv_len, BLOCK_SIZE, ROWS, KEYS
        )
        for start in range(first_key, full_end, KEYS):
            key = (start + tl.arange(0, KEYS)).to(tl.int64)
            k = load_parts(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
            v = load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            d_q = add_query_grads(q, k, v, grad, lse, delta, valid, d_q, factor, False)
        for start in range(full_end, last_position + 1, KEYS):
            key, real_key = key_tile(start, kv_len, KEYS)
            k = load_parts(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
            v = load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            visible = sees_in_own_block(position, key, BLOCK_SIZE)
            d_q = add_query_grads(q, k, v, grad, lse, delta, visible, d_q, factor, True)
        d_q = scale_parts(d_q, scale)
        if HAS_OWN:
            attends_own = tl.load(own_ptr + query) != 0
            d_q = keep_rows(d_q, attends_own)
    routed_offset = query.to(tl.int64) * COUNT
    partial = (query - piece_query).to(tl.int64) * COUNT
    for column in range(COUNT):
        selected = tl.load(routed_ptr + routed_offset + column) >= 0
        pair_grad = load_parts(partial_ptr, (partial + column) * DIM, DIM, TILE_DIM)
        d_q = add_parts(d_q, keep_rows(pair_grad, selected))
    store_parts(d_q_ptr, query.to(tl.int64) * DIM, valid, d_q, DIM, TILE_DIM)
