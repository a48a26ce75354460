"""Triton kernels of the forward pass.

`kernel_parts` defines the terms and sizes.
"""

import triton.language as tl

from flexmoba.backends.fused.kernel_parts import (
    LN_2,
    add_keys,
    add_visible_keys,
    dot_parts,
    head_offset,
    key_tile,
    load_pairs,
    load_parts,
    load_rows,
    own_range,
    pair_offset,
    query_tile_rows,
    sees_in_own_block,
    store_rows,
)
from flexmoba.runtime.triton_launch import kernel


@kernel
def attend_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, partial_lse_ptr, pair_ptr, bin_ptr, first_row_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64,
    first_row: tl.int32, last_row: tl.int32, first_query: tl.int32, first_kv_head: tl.int32,
    piece_pair: tl.int32, kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, n_blocks: tl.int32,
    factor: tl.float32,
    RAGGED: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    TILE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the partial outputs of about SHARE rows, with their log-sum-exps in base 2."""
    key = tl.arange(0, KEYS)
    begin = first_row + tl.program_id(0) * SHARE
    share_end = tl.minimum(begin + SHARE, last_row)
    while begin < share_end:  # one bin after another
        bin = tl.load(bin_ptr + begin).to(tl.int32)
        # The first tile of rows begins at the first row of the bin. A tile belongs to the share
        # that contains its first row.
        bin_begin, bin_end = tl.load(first_row_ptr + bin), tl.load(first_row_ptr + bin + 1)
        begin = bin_begin + tl.cdiv(begin - bin_begin, ROWS) * ROWS
        block = bin % (n_blocks + 1)
        if block < n_blocks:
            kv_head = first_kv_head + bin // (n_blocks + 1)
            first_key = block * BLOCK_SIZE
            n_keys = tl.minimum(kv_len - first_key, BLOCK_SIZE)
            q_head = q_ptr + head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
            k_block = k_ptr + head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
            v_block = v_ptr + head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
            k_block += first_key.to(tl.int64) * K_STRIDE
            v_block += first_key.to(tl.int64) * V_STRIDE
            end = tl.minimum(bin_end, share_end)
            first = first_query - kv_head * GROUP * q_len  # within the KV head
            pair = load_pairs(pair_ptr, begin, bin_end, ROWS)
            if BLOCK_SIZE <= KEYS:
                # All rows use the same tile of keys. Queries are loaded one iteration ahead, and
                # their pairs two.
                visible = key < n_keys
                real_key = tl.minimum(key, n_keys - 1)
                k = load_parts(k_block, real_key * K_STRIDE, DIM, TILE_DIM)
                v = load_rows(v_block, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
                offset = pair_offset(pair, first, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP, COUNT)
                q = load_parts(q_head, offset, DIM, TILE_DIM)
                next_pair = load_pairs(pair_ptr, begin + ROWS, bin_end, ROWS)
                for start in range(begin, end, ROWS):
                    offset = pair_offset(
                        next_pair, first, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP, COUNT
                    )
                    next_q = load_parts(q_head, offset, DIM, TILE_DIM)
                    after_pair = load_pairs(pair_ptr, start + 2 * ROWS, bin_end, ROWS)
                    scores = dot_parts(q, k)
                    if RAGGED:  # scaled before masking, because 0 * inf is NaN
                        scores = tl.where(visible[None, :], scores * factor, float("-inf"))
                        highest = tl.max(scores, 1)
                        weights = tl.exp2(scores - highest[:, None])
                    else:
                        highest = tl.max(scores, 1) * factor
                        weights = tl.exp2(scores * factor - highest[:, None])
                    total = tl.sum(weights, 1)
                    out = tl.dot(weights.to(v.dtype), v) * (1.0 / total)[:, None]
                    partial = (pair - piece_pair).to(tl.int64)
                    store_rows(
                        partial_ptr, partial * VALUE_DIM, pair >= 0, out, VALUE_DIM, TILE_VALUE_DIM
                    )
                    tl.store(partial_lse_ptr + partial, highest + tl.log2(total), mask=pair >= 0)
                    q, pair, next_pair = next_q, next_pair, after_pair
            else:
                for start in range(begin, end, ROWS):
                    offset = pair_offset(
                        pair, first, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP, COUNT
                    )
                    q = load_parts(q_head, offset, DIM, TILE_DIM)
                    highest = tl.full([ROWS], float("-inf"), tl.float32)
                    total = tl.zeros([ROWS], tl.float32)
                    out = tl.zeros([ROWS, TILE_VALUE_DIM], tl.float32)
                    for tile_key in range(0, BLOCK_SIZE, KEYS):
                        visible = tile_key + key < n_keys
                        block_key = (tile_key + key).to(tl.int64)
                        if RAGGED:
                            block_key = tl.minimum(block_key, n_keys - 1)
                        k = load_parts(k_block, block_key * K_STRIDE, DIM, TILE_DIM)
                        v = load_rows(v_block, block_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
                        if RAGGED:
                            highest, total, out = add_visible_keys(
                                q, k, v, visible[None, :], highest, total, out, factor
                            )
                        else:
                            highest, total, out = add_keys(q, k, v, highest, total, out, factor)
                    out *= (1.0 / total)[:, None]  # one division per row instead of per element
                    partial = (pair - piece_pair).to(tl.int64)
                    store_rows(
                        partial_ptr, partial * VALUE_DIM, pair >= 0, out, VALUE_DIM, TILE_VALUE_DIM
                    )
                    tl.store(partial_lse_ptr + partial, highest + tl.log2(total), mask=pair >= 0)
                    pair = load_pairs(pair_ptr, start + ROWS, bin_end, ROWS)
        begin = bin_end


@kernel
def finish_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, partial_lse_ptr, routed_ptr, own_ptr, out_ptr, lse_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64,
    first_tile: tl.int32, piece_query: tl.int32, heads: tl.int32, kv_heads: tl.int32,
    q_len: tl.int32, kv_len: tl.int32, factor: tl.float32,
    IS_CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    TILE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Attends from a tile of queries to their own blocks and merges their partial outputs."""
    head, first_row, row, valid = query_tile_rows(first_tile + tl.program_id(0), q_len, ROWS)
    query = head * q_len + row
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, TILE_VALUE_DIM], tl.float32)
    if IS_CAUSAL:
        q_ptr += head_offset(head, heads, q_stride_b, q_stride_h, UNIT)
        q = load_parts(q_ptr, row.to(tl.int64) * Q_STRIDE, DIM, TILE_DIM)
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
            highest, total, out = add_keys(q, k, v, highest, total, out, factor)
        for start in range(full_end, last_position + 1, KEYS):
            key, real_key = key_tile(start, kv_len, KEYS)
            k = load_parts(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
            v = load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            visible = sees_in_own_block(position, key, BLOCK_SIZE)
            highest, total, out = add_visible_keys(q, k, v, visible, highest, total, out, factor)
        if HAS_OWN:
            attends_own = tl.load(own_ptr + query) != 0
            highest = tl.where(attends_own, highest, float("-inf"))
            total = tl.where(attends_own, total, 0.0)
            out = tl.where(attends_own[:, None], out, 0.0)

    # The merge, by online softmax (arXiv 2502.13189, Alg. 1, line 16).
    routed_offset = query.to(tl.int64) * COUNT
    partial = (query - piece_query).to(tl.int64) * COUNT
    base = highest
    for column in range(COUNT):
        selected = tl.load(routed_ptr + routed_offset + column) >= 0
        partial_lse = tl.load(partial_lse_ptr + partial + column)  # undefined if the column is -1
        partial_lse = tl.where(selected, partial_lse, float("-inf"))
        base = tl.maximum(base, partial_lse)
    base = tl.where(base == float("-inf"), 0.0, base)
    decay = tl.exp2(highest - base)
    total *= decay
    out *= decay[:, None]
    for column in range(COUNT):
        selected = tl.load(routed_ptr + routed_offset + column) >= 0
        partial_lse = tl.load(partial_lse_ptr + partial + column)
        offset = (partial + column) * VALUE_DIM
        partial_out = load_rows(partial_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
        weight = tl.where(selected, tl.exp2(partial_lse - base), 0.0)
        total += weight
        out += tl.where(selected[:, None], partial_out, 0.0).to(tl.float32) * weight[:, None]
    lse = (base + tl.log2(total)) * LN_2
    out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    offset = query.to(tl.int64) * VALUE_DIM
    store_rows(out_ptr, offset, valid, out, VALUE_DIM, TILE_VALUE_DIM)
    tl.store(lse_ptr + query, lse, mask=valid)
