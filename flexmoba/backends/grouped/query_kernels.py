"""Triton kernels of attention over a shared selection, and of its gradients of queries.

`flexmoba.backends.fused.kernel_parts` defines the terms and sizes. A *tile* holds TOKENS
consecutive tokens of a KV head, and its list names the blocks that any of them selected, in
ascending order. A program reads each of these blocks once, for all tokens of its tile. The rows of
a matrix product are the query heads of the tokens, HEADS rows for each token: the GROUP heads and
padding.

The result of a token does not depend on the selections of the others, bit for bit: a block that it
did not select changes nothing. Nor does it depend on keys after the token, even if they are NaN.
The tokens of a tile see the same keys of a block, except for the *late keys*, which come after the
first token of the tile. These at most TOKENS - 1 keys are added one at a time, before all blocks.
"""

import triton
import triton.language as tl

from flexmoba.backends.fused.kernel_parts import (
    LN_2,
    LOG2_E,
    add_parts,
    add_query_grads,
    add_visible_keys,
    choose_rows,
    head_offset,
    load_parts,
    load_rows,
    scale_parts,
    store_parts,
    store_rows,
    zero_parts,
)
from flexmoba.runtime.triton_launch import kernel

_LAST = tl.constexpr(2**31 - 1)


@kernel
def list_blocks_kernel(
    selected_ptr, list_ptr, length_ptr, q_len: tl.int32,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Lists the blocks that the tokens of a tile selected, in ascending order.

    An entry is ``block << TOKENS``, and a bit for each token that selected the block.
    """
    tiles = tl.cdiv(q_len, TOKENS)
    kv_head, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TOKENS
    index = tl.arange(0, LIST)
    token, column = index // (LIST // TOKENS), index % (LIST // TOKENS)
    pair = (kv_head.to(tl.int64) * q_len + first + token) * COUNT + column
    exists = (first + token < q_len) & (column < COUNT)
    block = tl.load(selected_ptr + pair, mask=exists, other=-1)
    key = tl.sort(tl.where(block >= 0, block * TOKENS + token, _LAST))
    block = key // TOKENS
    bits = tl.zeros([LIST], tl.int64)
    for later in tl.static_range(TOKENS):
        other = tl.gather(key, tl.minimum(index + later, LIST - 1), 0)
        is_same = (other // TOKENS == block) & (index + later < LIST)
        bits += tl.where(is_same, tl.full([LIST], 1, tl.int64) << (other % TOKENS), 0)
    before = tl.gather(block, tl.maximum(index - 1, 0), 0)
    is_first = (key < _LAST) & ((index == 0) | (block != before))
    place = tl.cumsum(is_first.to(tl.int32), 0) - 1
    list_ptr += tl.program_id(0).to(tl.int64) * LIST
    tl.store(list_ptr + place, (block.to(tl.int64) << TOKENS) + bits, mask=is_first)
    tl.store(length_ptr + tl.program_id(0), tl.sum(is_first.to(tl.int32), 0))


@triton.jit
def rows_of_tile(q_len, kv_heads, TOKENS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Returns the KV head and the first token of a tile, and the token and head of each row.

    Tokens are counted in the tile, and heads in the group. Rows beyond the group repeat its last
    head, and rows beyond the sequence its last token. ``valid`` is False for both.
    """
    tiles = tl.cdiv(q_len, TOKENS)
    kv_head, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TOKENS
    row = tl.arange(0, TOKENS * HEADS)
    token, head = row // HEADS, row % HEADS
    valid = (first + token < q_len) & (head < GROUP)
    return kv_head, first, token, tl.minimum(head, GROUP - 1), valid


@triton.jit
def token_offset(
    kv_head, kv_heads, head, query, stride_b, stride_h,
    STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Returns the offsets of query heads of tokens in a strided ``(B, Hq, Lq, D)`` tensor."""
    first = head_offset(kv_head, kv_heads, stride_b, stride_h * GROUP, UNIT)
    return first + head.to(tl.int64) * stride_h * UNIT + query.to(tl.int64) * STRIDE


@triton.jit
def listed_keys(
    list_ptr, step, end_key, token,
    TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns a tile of keys of a listed block, which rows see which, and which see any.

    Keys from ``end_key`` on, or after the block, are clamped to the last one before, so that their
    values, which get weights of 0, are not NaN.
    """
    tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    entry = tl.load(list_ptr + step // tiles)
    start = (entry >> TOKENS).to(tl.int32) * BLOCK_SIZE
    end = tl.minimum(start + BLOCK_SIZE, end_key)
    key = start + step % tiles * KEYS + tl.arange(0, KEYS)
    sees_some = (((entry >> token) & 1) == 1) & (start < end)
    visible = sees_some[:, None] & (key < end)[None, :]
    return tl.maximum(tl.minimum(key, end - 1), 0).to(tl.int64), visible, sees_some


@triton.jit
def late_key(
    late, list_ptr, length, first_position, kv_len, token,
    TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Returns the key that is ``late`` positions after the first token, and which rows see it."""
    index = tl.arange(0, LIST)
    entry = tl.load(list_ptr + index, mask=index < length, other=0)
    key = tl.minimum(first_position + late, kv_len - 1)
    in_block = (entry >> TOKENS).to(tl.int32) == key // BLOCK_SIZE
    bits = tl.sum(tl.where(in_block, (entry & ((1 << TOKENS) - 1)).to(tl.int32), 0), 0)
    return key.to(tl.int64), (token >= late) & (((bits >> token) & 1) == 1)


@triton.jit
def load_row(ptr, offset, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Loads a row ``(1, TILE_DIM)`` in float32."""
    dim = tl.arange(0, TILE_DIM)
    return tl.load(ptr + offset + dim, mask=dim < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_key(ptr, offset, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Loads a key as `load_row` does, in parts of the head dim."""
    return (
        (load_row(ptr, offset, 128, 128), load_row(ptr + 128, offset, DIM - 128, 64))
        if TILE_DIM == 192
        else (load_row(ptr, offset, DIM, TILE_DIM),)
    )


@triton.jit
def dots_with_key(q, k_row):
    """Returns the inner products of queries with one key, in float32."""
    dots = tl.sum(q[0].to(tl.float32) * k_row[0], 1)
    for i in tl.static_range(1, len(q)):
        dots += tl.sum(q[i].to(tl.float32) * k_row[i], 1)
    return dots


@kernel
def attend_kernel(
    q_ptr, k_ptr, v_ptr, list_ptr, length_ptr, out_ptr, lse_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64,
    kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, factor: tl.float32,
    IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    LIST: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the attention of the tokens of a tile."""
    kv_head, first, token, head, valid = rows_of_tile(q_len, kv_heads, TOKENS, GROUP, HEADS)
    query = tl.minimum(first + token, q_len - 1)
    offset = token_offset(
        kv_head, kv_heads, head, query, q_stride_b, q_stride_h, Q_STRIDE, UNIT, GROUP
    )
    q = load_parts(q_ptr, offset, DIM, TILE_DIM)
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    list_ptr += tl.program_id(0).to(tl.int64) * LIST
    length = tl.load(length_ptr + tl.program_id(0))
    first_position = first + kv_len - q_len
    highest = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    out = tl.zeros([TOKENS * HEADS, TILE_VALUE_DIM], tl.float32)
    end_key = kv_len
    if IS_CAUSAL:
        end_key = first_position + 1
        for late in range(1, TOKENS):
            key, sees = late_key(
                late, list_ptr, length, first_position, kv_len, token, TOKENS, BLOCK_SIZE, LIST
            )
            k_row = load_key(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
            v_row = load_row(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            score = dots_with_key(q, k_row) * factor
            score = tl.where(sees, score, float("-inf"))
            new_highest = tl.maximum(highest, score)
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight, decay = tl.exp2(score - base), tl.exp2(highest - base)
            total = total * decay + weight
            new_out = out * decay[:, None] + weight[:, None] * v_row
            out = tl.where(sees[:, None], new_out, out)
            highest = new_highest
    tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    for step in range(length * tiles):
        key, visible, sees_some = listed_keys(
            list_ptr, step, end_key, token, TOKENS, BLOCK_SIZE, KEYS
        )
        k = load_parts(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
        v = load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
        highest, total, new_out = add_visible_keys(q, k, v, visible, highest, total, out, factor)
        out = tl.where(sees_some[:, None], new_out, out)  # values that it does not see may be NaN
    out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    row = (kv_head.to(tl.int64) * GROUP + head) * q_len + query
    store_rows(out_ptr, row * VALUE_DIM, valid, out, VALUE_DIM, TILE_VALUE_DIM)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(lse_ptr + row, (base + tl.log2(total)) * LN_2, mask=valid)


@kernel
def query_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, grad_lse_ptr, list_ptr, length_ptr,
    d_q_ptr, delta_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    kv_heads: tl.int32, q_len: tl.int32, kv_len: tl.int32, factor: tl.float32, scale: tl.float32,
    IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    LIST: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the query heads of the tokens of a tile, and writes ``delta``.

    ``delta`` is ``<grad, out> - grad_lse``, a term of the gradients of scores.
    """
    kv_head, first, token, head, valid = rows_of_tile(q_len, kv_heads, TOKENS, GROUP, HEADS)
    query = tl.minimum(first + token, q_len - 1)
    offset = token_offset(
        kv_head, kv_heads, head, query, q_stride_b, q_stride_h, Q_STRIDE, UNIT, GROUP
    )
    q = load_parts(q_ptr, offset, DIM, TILE_DIM)
    offset = token_offset(
        kv_head, kv_heads, head, query, grad_stride_b, grad_stride_h, GRAD_STRIDE, UNIT, GROUP
    )
    grad = load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    row = (kv_head.to(tl.int64) * GROUP + head) * q_len + query
    out = load_rows(out_ptr, row * VALUE_DIM, VALUE_DIM, TILE_VALUE_DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row)
    tl.store(delta_ptr + row, delta, mask=valid)
    lse = tl.load(lse_ptr + row) * LOG2_E
    k_ptr += head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    list_ptr += tl.program_id(0).to(tl.int64) * LIST
    length = tl.load(length_ptr + tl.program_id(0))
    first_position = first + kv_len - q_len
    d_q = zero_parts(TOKENS * HEADS, TILE_DIM)
    end_key = kv_len
    if IS_CAUSAL:
        end_key = first_position + 1
        for late in range(1, TOKENS):
            key, sees = late_key(
                late, list_ptr, length, first_position, kv_len, token, TOKENS, BLOCK_SIZE, LIST
            )
            k_row = load_key(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
            v_row = load_row(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            weight = tl.exp2(dots_with_key(q, k_row) * factor - lse)
            d_score = weight * (tl.sum(grad.to(tl.float32) * v_row, 1) - delta)
            new_d_q = add_parts(d_q, scale_parts(k_row, d_score[:, None]))
            d_q = choose_rows(sees, new_d_q, d_q)
    tiles: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    for step in range(length * tiles):
        key, visible, sees_some = listed_keys(
            list_ptr, step, end_key, token, TOKENS, BLOCK_SIZE, KEYS
        )
        k = load_parts(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
        v = load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
        new_d_q = add_query_grads(q, k, v, grad, lse, delta, visible, d_q, factor, True)
        d_q = choose_rows(sees_some, new_d_q, d_q)
    store_parts(d_q_ptr, row * DIM, valid, scale_parts(d_q, scale), DIM, TILE_DIM)
