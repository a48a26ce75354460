"""The Triton kernels of the fused implementation; `fused` launches them.

Queries are flat, ``(b * Hq + h) * Lq + i``. A *pair* is a query and one of its routed blocks,
``(query - first_query) * COUNT + slot``. A *bin* is a block of keys of one KV head, or that head's
bin of pairs without a block: ``kv_head * (n_blocks + 1) + block``. Pairs sorted by bin are *rows*;
``pair`` and ``bin`` hold both of each row. Scores are in units of log2: ``factor`` is the scale,
which is not negative, over ln(2).

Sizes: ROWS queries and KEYS keys are multiplied at once; DIM and VALUE_DIM are the head dims,
TILE_DIM and TILE_VALUE_DIM the powers of two that hold them.
"""

import triton
import triton.language as tl

from flexmoba.launch import kernel

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


# ---- Parts of kernels ---------------------------------------------------------------------------


@triton.jit
def _head_offset(head, heads, stride_b, stride_h, UNIT: tl.constexpr):
    """Where a flat head of a strided ``(B, H, L, D)`` tensor begins."""
    batch = head // heads
    return (batch * stride_b + (head - batch * heads) * stride_h) * UNIT


@triton.jit
def _rows_offset(
    query, q_len, stride_h, STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr
):
    """Where queries of one KV head begin, counted from its first query head's first."""
    if GROUP == 1:
        offset = query.to(tl.int64) * STRIDE
    else:
        member = query // q_len
        offset = member * stride_h * UNIT + (query - member * q_len).to(tl.int64) * STRIDE
    return offset


@triton.jit
def _load_rows(ptr, offset, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """``(rows, TILE_DIM)``. Rows are not masked, which costs much: whoever calls clamps them."""
    dim = tl.arange(0, TILE_DIM)
    pointers = ptr + offset[:, None] + dim[None, :]
    if DIM == TILE_DIM:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    return x


@triton.jit
def _store_rows(ptr, offset, there, x, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    dim = tl.arange(0, TILE_DIM)
    mask = there[:, None]
    if DIM != TILE_DIM:
        mask = mask & (dim < DIM)[None, :]
    tl.store(ptr + offset[:, None] + dim[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_keys(q, k, v, highest, total, out, factor):
    """One step of online softmax: the keys ``k``, seen by all rows, join ``out``."""
    dots = tl.dot(q, tl.trans(k))
    new_highest = tl.maximum(highest, tl.max(dots, 1) * factor)
    weights = tl.exp2(dots * factor - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return new_highest, total, out


@triton.jit
def _add_seen_keys(q, k, v, seen, highest, total, out, factor):
    """`_add_keys` where rows see only some of the keys, or none yet."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * factor, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(highest - base)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return new_highest, total, out


@triton.jit
def _add_query_grads(q, k, v, grad, lse, delta, seen, d_q, factor, MASKED: tl.constexpr):
    """What the keys ``k`` add to the gradients of the rows ``q``, but for the scale."""
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * factor - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (tl.dot(grad, tl.trans(v)) - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, d_q)


@triton.jit
def _add_key_grads(q, k, v, grad, lse, delta, seen, d_k, d_v, factor, MASKED: tl.constexpr):
    """What the rows ``q`` add to the gradients of keys and values; also the scores' gradients."""
    weights = tl.exp2(tl.dot(k, tl.trans(q)) * factor - lse[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_v = tl.dot(weights.to(grad.dtype), grad, d_v)
    d_scores = weights * (tl.dot(v, tl.trans(grad)) - delta[None, :])
    d_scores = d_scores.to(q.dtype)
    return tl.dot(d_scores, q, d_k), d_v, d_scores


@triton.jit
def _load_pairs(pair_ptr, start, end, ROWS: tl.constexpr):
    """The pairs of a tile of rows; -1 beyond the end."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pair_ptr + row, mask=row < end, other=-1)


@triton.jit
def _clamped_pairs(pair_ptr, start, end, ROWS: tl.constexpr):
    """The pairs of a tile of rows, the last one again beyond the end; and which are there."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pair_ptr + tl.minimum(row, end - 1)), row < end


@triton.jit
def _pair_offset(
    pair, first, q_len, stride_h,
    STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Where the queries of pairs begin, in their KV head; ``first`` is the call's first query."""
    query = tl.where(pair >= 0, first + pair // COUNT, 0)
    return _rows_offset(query, q_len, stride_h, STRIDE, UNIT, GROUP)


@triton.jit
def _item_rows(item, block, n_blocks, first_row_ptr, first_item_ptr, item_rows):
    """Which rows an item of a block (counted over all KV heads) holds."""
    bin = block + block // n_blocks
    begin = tl.load(first_row_ptr + bin) + (item - tl.load(first_item_ptr + block)) * item_rows
    return begin, tl.minimum(begin + item_rows, tl.load(first_row_ptr + bin + 1))


@triton.jit
def _query_tile(tile, q_len, ROWS: tl.constexpr):
    """Its head, its first row, its rows, the last again beyond the end; and which are there."""
    tiles_per_head = tl.cdiv(q_len, ROWS)
    first_row = tile % tiles_per_head * ROWS
    row = first_row + tl.arange(0, ROWS)
    return tile // tiles_per_head, first_row, tl.minimum(row, q_len - 1), row < q_len


@triton.jit
def _some_keys(start, end, KEYS: tl.constexpr):
    """A tile of keys, and the same with the last one again beyond the end."""
    key = start + tl.arange(0, KEYS)
    return key, tl.minimum(key, end - 1).to(tl.int64)


@triton.jit
def _sees_own(position, key, BLOCK_SIZE: tl.constexpr):
    """Which keys stand in the own block of each query, and not after it."""
    first = position // BLOCK_SIZE * BLOCK_SIZE
    return (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])


@triton.jit
def _own_range(
    first_row, q_len, kv_len, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Keys of the own blocks of a tile of queries: first, end of those that all see, last."""
    first_position = first_row + kv_len - q_len
    last_position = tl.minimum(first_row + ROWS, q_len) - 1 + kv_len - q_len
    first_key = first_position // BLOCK_SIZE * BLOCK_SIZE
    whole_end = first_key
    if first_key == last_position // BLOCK_SIZE * BLOCK_SIZE:  # all in one block
        whole_end += (first_position + 1 - first_key) // KEYS * KEYS
    return first_key, whole_end, last_position


# ---- Routing ------------------------------------------------------------------------------------


@kernel
def bin_kernel(
    routed_ptr, bin_ptr,
    first_pair: tl.int64, n_pairs: tl.int32, first_query: tl.int32,
    queries_per_kv_head: tl.int32, n_blocks: tl.int32,
    COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bin of every pair."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = pair < n_pairs
    block = tl.load(routed_ptr + first_pair + tl.minimum(pair, n_pairs - 1))
    kv_head = (first_query + pair // COUNT) // queries_per_kv_head
    kv_head -= first_query // queries_per_kv_head
    bin = kv_head * (n_blocks + 1) + tl.where(block >= 0, block, n_blocks)
    tl.store(bin_ptr + pair, bin.to(bin_ptr.dtype.element_ty), mask=there)


@kernel
def first_items_kernel(
    first_row_ptr, first_item_ptr, first_extra_ptr, first_query_item_ptr,
    all_blocks: tl.int32, n_blocks: tl.int32, item_rows: tl.int32,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Cuts the rows of every block into items: running sums of how many, by one program.

    Of ``item_rows`` rows, at least one a block, for gradients of keys; those blocks that have
    several come again in ``first_extra``. Of ROWS rows for gradients of queries.
    """
    items, extra, query_items = 0, 0, 0
    for start in range(0, all_blocks, TILE):
        block = start + tl.arange(0, TILE)
        there = block < all_blocks
        bin = block + block // n_blocks
        rows = tl.load(first_row_ptr + bin + 1, mask=there, other=0)
        rows -= tl.load(first_row_ptr + bin, mask=there, other=0)
        n_items = tl.where(there, tl.maximum(tl.cdiv(rows, item_rows), 1), 0)
        n_extra = tl.where(n_items > 1, n_items, 0)
        n_query_items = tl.cdiv(rows, ROWS)
        tl.store(first_item_ptr + block, items + tl.cumsum(n_items) - n_items, mask=there)
        tl.store(first_extra_ptr + block, extra + tl.cumsum(n_extra) - n_extra, mask=there)
        before = query_items + tl.cumsum(n_query_items) - n_query_items
        tl.store(first_query_item_ptr + block, before, mask=there)
        items += tl.sum(n_items)
        extra += tl.sum(n_extra)
        query_items += tl.sum(n_query_items)
    tl.store(first_item_ptr + all_blocks, items)
    tl.store(first_query_item_ptr + all_blocks, query_items)


@kernel
def list_items_kernel(first_item_ptr, block_of_item_ptr, TILE: tl.constexpr):
    """Writes down, for every item, its block."""
    block = tl.program_id(0)
    end = tl.load(first_item_ptr + block + 1)
    for start in range(tl.load(first_item_ptr + block), end, TILE):
        item = start + tl.arange(0, TILE)
        tl.store(block_of_item_ptr + item, tl.zeros([TILE], tl.int32) + block, mask=item < end)


# ---- Forward ------------------------------------------------------------------------------------


@kernel
def attend_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, pair_ptr, bin_ptr, first_row_ptr,
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
    """The parts of about SHARE rows: attention to their blocks, and its log-sum-exp."""
    key = tl.arange(0, KEYS)
    begin = first_row + tl.program_id(0) * SHARE
    share_end = tl.minimum(begin + SHARE, last_row)
    while begin < share_end:  # the rows of one bin after the other
        bin = tl.load(bin_ptr + begin).to(tl.int32)
        # Tiles of rows are counted from the first row of the bin: they belong to the share that
        # they begin in.
        bin_begin, bin_end = tl.load(first_row_ptr + bin), tl.load(first_row_ptr + bin + 1)
        begin = bin_begin + tl.cdiv(begin - bin_begin, ROWS) * ROWS
        block = bin % (n_blocks + 1)
        if block < n_blocks:
            kv_head = first_kv_head + bin // (n_blocks + 1)
            first_key = block * BLOCK_SIZE
            n_keys = tl.minimum(kv_len - first_key, BLOCK_SIZE)
            q_head = q_ptr + _head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
            k_block = k_ptr + _head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
            v_block = v_ptr + _head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
            k_block += first_key.to(tl.int64) * K_STRIDE
            v_block += first_key.to(tl.int64) * V_STRIDE
            end = tl.minimum(bin_end, share_end)
            first = first_query - kv_head * GROUP * q_len  # counted within the KV head
            pair = _load_pairs(pair_ptr, begin, bin_end, ROWS)
            if BLOCK_SIZE <= KEYS:
                # One tile of keys serves all rows. Queries are loaded an iteration ahead, and
                # which they are two.
                seen = key < n_keys
                at = tl.minimum(key, n_keys - 1)
                k = _load_rows(k_block, at * K_STRIDE, DIM, TILE_DIM)
                v = _load_rows(v_block, at * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
                at = _pair_offset(pair, first, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP, COUNT)
                q = _load_rows(q_head, at, DIM, TILE_DIM)
                next_pair = _load_pairs(pair_ptr, begin + ROWS, bin_end, ROWS)
                for start in range(begin, end, ROWS):
                    at = _pair_offset(
                        next_pair, first, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP, COUNT
                    )
                    next_q = _load_rows(q_head, at, DIM, TILE_DIM)
                    after_pair = _load_pairs(pair_ptr, start + 2 * ROWS, bin_end, ROWS)
                    scores = tl.dot(q, tl.trans(k))
                    if RAGGED:  # scaled before they are masked, as 0 * inf is NaN
                        scores = tl.where(seen[None, :], scores * factor, float("-inf"))
                        highest = tl.max(scores, 1)
                        weights = tl.exp2(scores - highest[:, None])
                    else:
                        highest = tl.max(scores, 1) * factor
                        weights = tl.exp2(scores * factor - highest[:, None])
                    total = tl.sum(weights, 1)
                    out = tl.dot(weights.to(v.dtype), v) * (1.0 / total)[:, None]
                    part = (pair - piece_pair).to(tl.int64)
                    _store_rows(
                        part_ptr, part * VALUE_DIM, pair >= 0, out, VALUE_DIM, TILE_VALUE_DIM
                    )
                    tl.store(part_lse_ptr + part, highest + tl.log2(total), mask=pair >= 0)
                    q, pair, next_pair = next_q, next_pair, after_pair
            else:
                for start in range(begin, end, ROWS):
                    at = _pair_offset(pair, first, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP, COUNT)
                    q = _load_rows(q_head, at, DIM, TILE_DIM)
                    highest = tl.full([ROWS], float("-inf"), tl.float32)
                    total = tl.zeros([ROWS], tl.float32)
                    out = tl.zeros([ROWS, TILE_VALUE_DIM], tl.float32)
                    for place in range(0, BLOCK_SIZE, KEYS):
                        seen = place + key < n_keys
                        row = (place + key).to(tl.int64)
                        if RAGGED:
                            row = tl.minimum(row, n_keys - 1)
                        k = _load_rows(k_block, row * K_STRIDE, DIM, TILE_DIM)
                        v = _load_rows(v_block, row * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
                        if RAGGED:
                            highest, total, out = _add_seen_keys(
                                q, k, v, seen[None, :], highest, total, out, factor
                            )
                        else:
                            highest, total, out = _add_keys(q, k, v, highest, total, out, factor)
                    out *= (1.0 / total)[:, None]  # one division a row, not one an element
                    part = (pair - piece_pair).to(tl.int64)
                    _store_rows(
                        part_ptr, part * VALUE_DIM, pair >= 0, out, VALUE_DIM, TILE_VALUE_DIM
                    )
                    tl.store(part_lse_ptr + part, highest + tl.log2(total), mask=pair >= 0)
                    pair = _load_pairs(pair_ptr, start + ROWS, bin_end, ROWS)
        begin = bin_end


@kernel
def finish_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, routed_ptr, own_ptr, out_ptr, lse_ptr,
    q_stride_b: tl.int64, q_stride_h: tl.int64, k_stride_b: tl.int64, k_stride_h: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64,
    first_tile: tl.int32, piece_query: tl.int32, heads: tl.int32, kv_heads: tl.int32,
    q_len: tl.int32, kv_len: tl.int32, factor: tl.float32,
    IS_CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    TILE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to their own blocks, merged with their routed parts."""
    head, first_row, row, there = _query_tile(first_tile + tl.program_id(0), q_len, ROWS)
    query = head * q_len + row
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, TILE_VALUE_DIM], tl.float32)
    if IS_CAUSAL:
        q_ptr += _head_offset(head, heads, q_stride_b, q_stride_h, UNIT)
        q = _load_rows(q_ptr, row.to(tl.int64) * Q_STRIDE, DIM, TILE_DIM)
        kv_head = head // (heads // kv_heads)
        k_ptr += _head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
        v_ptr += _head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
        position = row + kv_len - q_len
        first_key, whole_end, last_position = _own_range(
            first_row, q_len, kv_len, BLOCK_SIZE, ROWS, KEYS
        )
        for start in range(first_key, whole_end, KEYS):
            key = (start + tl.arange(0, KEYS)).to(tl.int64)
            k = _load_rows(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
            v = _load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            highest, total, out = _add_keys(q, k, v, highest, total, out, factor)
        for start in range(whole_end, last_position + 1, KEYS):
            key, real_key = _some_keys(start, kv_len, KEYS)
            k = _load_rows(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
            v = _load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            seen = _sees_own(position, key, BLOCK_SIZE)
            highest, total, out = _add_seen_keys(q, k, v, seen, highest, total, out, factor)
        if HAS_OWN:
            wanted = tl.load(own_ptr + query) != 0
            highest = tl.where(wanted, highest, float("-inf"))
            total = tl.where(wanted, total, 0.0)
            out = tl.where(wanted[:, None], out, 0.0)

    # The merge, by online softmax (arXiv 2502.13189, Alg. 1, line 16).
    choice = query.to(tl.int64) * COUNT
    part = (query - piece_query).to(tl.int64) * COUNT
    base = highest
    for slot in range(COUNT):
        chosen = tl.load(routed_ptr + choice + slot) >= 0
        part_lse = tl.load(part_lse_ptr + part + slot)  # rubbish where there is no part
        part_lse = tl.where(chosen, part_lse, float("-inf"))
        base = tl.maximum(base, part_lse)
    base = tl.where(base == float("-inf"), 0.0, base)
    decay = tl.exp2(highest - base)
    total *= decay
    out *= decay[:, None]
    for slot in range(COUNT):
        chosen = tl.load(routed_ptr + choice + slot) >= 0
        part_lse = tl.load(part_lse_ptr + part + slot)
        at = (part + slot) * VALUE_DIM
        x = _load_rows(part_ptr, at, VALUE_DIM, TILE_VALUE_DIM)
        weight = tl.where(chosen, tl.exp2(part_lse - base), 0.0)
        total += weight
        out += tl.where(chosen[:, None], x, 0.0).to(tl.float32) * weight[:, None]
    lse = (base + tl.log2(total)) * _LN_2
    out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    at = query.to(tl.int64) * VALUE_DIM
    _store_rows(out_ptr, at, there, out, VALUE_DIM, TILE_VALUE_DIM)
    tl.store(lse_ptr + query, lse, mask=there)


# ---- Backward -----------------------------------------------------------------------------------


@kernel
def delta_kernel(
    grad_ptr, out_ptr, grad_lse_ptr, delta_ptr,
    grad_stride_b: tl.int64, grad_stride_h: tl.int64,
    n_queries: tl.int32, q_len: tl.int32, heads: tl.int32,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``<grad, out> - grad_lse`` of every query: what all its scores' gradients subtract."""
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = query < n_queries
    query = tl.minimum(query, n_queries - 1)
    head = query // q_len
    offset = _head_offset(head, heads, grad_stride_b, grad_stride_h, UNIT)
    offset += (query - head * q_len).to(tl.int64) * GRAD_STRIDE
    grad = _load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    at = query.to(tl.int64) * VALUE_DIM
    out = _load_rows(out_ptr, at, VALUE_DIM, TILE_VALUE_DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + query)
    tl.store(delta_ptr + query, delta, mask=there)


@kernel
def key_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, own_ptr,
    d_k_ptr, d_v_ptr, extra_ptr, part_ptr,
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
    GRAD_STRIDE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys, from the rows of an item and, in its first, the own queries.

    A block of several items leaves their shares in ``extra``, in float32. Where one tile holds a
    whole block, the parts of the queries' gradients are computed along the way.
    """
    tiles_per_block: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    item = tl.load(first_item_ptr + first_block) + tl.program_id(0) // tiles_per_block
    if item >= tl.load(first_item_ptr + last_block):
        return
    block = tl.load(block_of_item_ptr + item)
    begin, end = _item_rows(item, block, n_blocks, first_row_ptr, first_item_ptr, item_rows)
    kv_head = first_kv_head + block // n_blocks
    block_key = block % n_blocks * BLOCK_SIZE
    block_end = tl.minimum(block_key + BLOCK_SIZE, kv_len)
    first_key = block_key + tl.program_id(0) % tiles_per_block * KEYS
    key, real_key = _some_keys(first_key, block_end, KEYS)
    real = key < block_end
    k_ptr += _head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += _head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    k = _load_rows(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
    v = _load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
    q_ptr += _head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
    grad_ptr += _head_offset(kv_head, kv_heads, grad_stride_b, grad_stride_h * GROUP, UNIT)
    d_k = tl.zeros([KEYS, TILE_DIM], tl.float32)
    d_v = tl.zeros([KEYS, TILE_VALUE_DIM], tl.float32)
    for start in range(begin, end, ROWS):
        pair, there = _clamped_pairs(pair_ptr, start, end, ROWS)
        query = first_query + pair // COUNT - kv_head * GROUP * q_len
        offset = _rows_offset(query, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP)
        q = _load_rows(q_ptr, offset, DIM, TILE_DIM)
        offset = _rows_offset(query, q_len, grad_stride_h, GRAD_STRIDE, UNIT, GROUP)
        grad = _load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
        query += kv_head * GROUP * q_len
        # With weight 0 a row that comes again adds nothing.
        lse = tl.where(there, tl.load(lse_ptr + query) * _LOG2_E, float("inf"))
        delta = tl.load(delta_ptr + query)
        d_k, d_v, d_scores = _add_key_grads(
            q, k, v, grad, lse, delta, real[:, None], d_k, d_v, factor, RAGGED
        )
        if tiles_per_block == 1:
            d_q = tl.dot(tl.trans(d_scores), k) * scale
            part = (pair - piece_pair).to(tl.int64) * DIM
            _store_rows(part_ptr, part, there, d_q, DIM, TILE_DIM)
    item_of_block = item - tl.load(first_item_ptr + block)
    if IS_CAUSAL:
        if item_of_block == 0:
            offset = kv_len - q_len
            for member in range(GROUP):
                for start in range(tl.maximum(first_key, offset), block_end, ROWS):
                    there = start + tl.arange(0, ROWS) < block_end
                    position = tl.minimum(start + tl.arange(0, ROWS), block_end - 1)
                    query = member * q_len + position - offset
                    at = _rows_offset(query, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP)
                    q = _load_rows(q_ptr, at, DIM, TILE_DIM)
                    at = _rows_offset(query, q_len, grad_stride_h, GRAD_STRIDE, UNIT, GROUP)
                    grad = _load_rows(grad_ptr, at, VALUE_DIM, TILE_VALUE_DIM)
                    query += kv_head * GROUP * q_len
                    lse = tl.load(lse_ptr + query) * _LOG2_E
                    delta = tl.load(delta_ptr + query)
                    if HAS_OWN:
                        there = there & (tl.load(own_ptr + query) != 0)
                    seen = there[None, :] & (key[:, None] <= position[None, :])
                    d_k, d_v, _ = _add_key_grads(
                        q, k, v, grad, lse, delta, seen, d_k, d_v, factor, True
                    )
    items = tl.load(first_item_ptr + block + 1) - tl.load(first_item_ptr + block)
    if items == 1:
        at = kv_head.to(tl.int64) * kv_len + key
        _store_rows(d_k_ptr, at * DIM, real, d_k * scale, DIM, TILE_DIM)
        _store_rows(d_v_ptr, at * VALUE_DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)
    else:
        slot = tl.load(first_extra_ptr + block) - tl.load(first_extra_ptr + first_block)
        slot = (slot + item_of_block).to(tl.int64)
        at = (slot * BLOCK_SIZE + key - block_key) * (DIM + VALUE_DIM)
        _store_rows(extra_ptr, at, real, d_k, DIM, TILE_DIM)
        _store_rows(extra_ptr, at + DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)


@kernel
def sum_extra_kernel(
    extra_ptr, d_k_ptr, d_v_ptr, first_item_ptr, first_extra_ptr,
    first_block: tl.int32, first_kv_head: tl.int32, kv_len: tl.int32, n_blocks: tl.int32,
    scale: tl.float32,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Sums the shares of the items of a block, in their order."""
    tiles_per_block: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    block = first_block + tl.program_id(0) // tiles_per_block
    items = tl.load(first_item_ptr + block + 1) - tl.load(first_item_ptr + block)
    if items == 1:
        return
    block_key = block % n_blocks * BLOCK_SIZE
    key = block_key + tl.program_id(0) % tiles_per_block * KEYS + tl.arange(0, KEYS)
    real = key < tl.minimum(block_key + BLOCK_SIZE, kv_len)
    d_k = tl.zeros([KEYS, TILE_DIM], tl.float32)
    d_v = tl.zeros([KEYS, TILE_VALUE_DIM], tl.float32)
    first_slot = tl.load(first_extra_ptr + block) - tl.load(first_extra_ptr + first_block)
    first_slot = first_slot.to(tl.int64)
    for item in range(items):
        at = (first_slot + item) * BLOCK_SIZE + tl.minimum(key - block_key, BLOCK_SIZE - 1)
        d_k += _load_rows(extra_ptr, at * (DIM + VALUE_DIM), DIM, TILE_DIM)
        d_v += _load_rows(extra_ptr, at * (DIM + VALUE_DIM) + DIM, VALUE_DIM, TILE_VALUE_DIM)
    at = (first_kv_head + block // n_blocks).to(tl.int64) * kv_len + key
    _store_rows(d_k_ptr, at * DIM, real, d_k * scale, DIM, TILE_DIM)
    _store_rows(d_v_ptr, at * VALUE_DIM, real, d_v, VALUE_DIM, TILE_VALUE_DIM)


@kernel
def item_query_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, part_ptr,
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
    """The parts of the queries' gradients from a block of several tiles, for an item of ROWS."""
    item = tl.load(first_item_ptr + first_block) + tl.program_id(0)
    if item >= tl.load(first_item_ptr + last_block):
        return
    block = tl.load(block_of_item_ptr + item)
    begin, end = _item_rows(item, block, n_blocks, first_row_ptr, first_item_ptr, ROWS)
    kv_head = first_kv_head + block // n_blocks
    first_key = block % n_blocks * BLOCK_SIZE
    n_keys = tl.minimum(kv_len - first_key, BLOCK_SIZE)
    k_ptr += _head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
    v_ptr += _head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
    k_ptr += first_key.to(tl.int64) * K_STRIDE
    v_ptr += first_key.to(tl.int64) * V_STRIDE
    q_ptr += _head_offset(kv_head, kv_heads, q_stride_b, q_stride_h * GROUP, UNIT)
    grad_ptr += _head_offset(kv_head, kv_heads, grad_stride_b, grad_stride_h * GROUP, UNIT)
    pair, there = _clamped_pairs(pair_ptr, begin, end, ROWS)
    query = first_query + pair // COUNT - kv_head * GROUP * q_len
    offset = _rows_offset(query, q_len, q_stride_h, Q_STRIDE, UNIT, GROUP)
    q = _load_rows(q_ptr, offset, DIM, TILE_DIM)
    offset = _rows_offset(query, q_len, grad_stride_h, GRAD_STRIDE, UNIT, GROUP)
    grad = _load_rows(grad_ptr, offset, VALUE_DIM, TILE_VALUE_DIM)
    query += kv_head * GROUP * q_len
    lse = tl.load(lse_ptr + query) * _LOG2_E
    delta = tl.load(delta_ptr + query)
    d_q = tl.zeros([ROWS, TILE_DIM], tl.float32)
    for start in range(0, BLOCK_SIZE, KEYS):
        seen = start + tl.arange(0, KEYS) < n_keys
        key = (start + tl.arange(0, KEYS)).to(tl.int64)
        if RAGGED:
            key = tl.minimum(key, n_keys - 1)
        k = _load_rows(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
        v = _load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
        d_q = _add_query_grads(q, k, v, grad, lse, delta, seen[None, :], d_q, factor, RAGGED)
    part = (pair - piece_pair).to(tl.int64) * DIM
    _store_rows(part_ptr, part, there, d_q * scale, DIM, TILE_DIM)


@kernel
def finish_query_grads_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, part_ptr, routed_ptr, own_ptr, d_q_ptr,
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
    """Gradients of a tile of queries: from their own blocks, and the sum of their parts."""
    head, first_row, row, there = _query_tile(first_tile + tl.program_id(0), q_len, ROWS)
    query = head * q_len + row
    d_q = tl.zeros([ROWS, TILE_DIM], tl.float32)
    if IS_CAUSAL:
        q_ptr += _head_offset(head, heads, q_stride_b, q_stride_h, UNIT)
        q = _load_rows(q_ptr, row.to(tl.int64) * Q_STRIDE, DIM, TILE_DIM)
        grad_ptr += _head_offset(head, heads, grad_stride_b, grad_stride_h, UNIT)
        at = row.to(tl.int64) * GRAD_STRIDE
        grad = _load_rows(grad_ptr, at, VALUE_DIM, TILE_VALUE_DIM)
        lse = tl.load(lse_ptr + query) * _LOG2_E
        delta = tl.load(delta_ptr + query)
        kv_head = head // (heads // kv_heads)
        k_ptr += _head_offset(kv_head, kv_heads, k_stride_b, k_stride_h, UNIT)
        v_ptr += _head_offset(kv_head, kv_heads, v_stride_b, v_stride_h, UNIT)
        position = row + kv_len - q_len
        first_key, whole_end, last_position = _own_range(
            first_row, q_len, kv_len, BLOCK_SIZE, ROWS, KEYS
        )
        for start in range(first_key, whole_end, KEYS):
            key = (start + tl.arange(0, KEYS)).to(tl.int64)
            k = _load_rows(k_ptr, key * K_STRIDE, DIM, TILE_DIM)
            v = _load_rows(v_ptr, key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            d_q = _add_query_grads(q, k, v, grad, lse, delta, there, d_q, factor, False)
        for start in range(whole_end, last_position + 1, KEYS):
            key, real_key = _some_keys(start, kv_len, KEYS)
            k = _load_rows(k_ptr, real_key * K_STRIDE, DIM, TILE_DIM)
            v = _load_rows(v_ptr, real_key * V_STRIDE, VALUE_DIM, TILE_VALUE_DIM)
            seen = _sees_own(position, key, BLOCK_SIZE)
            d_q = _add_query_grads(q, k, v, grad, lse, delta, seen, d_q, factor, True)
        d_q *= scale
        if HAS_OWN:
            wanted = tl.load(own_ptr + query) != 0
            d_q = tl.where(wanted[:, None], d_q, 0.0)
    choice = query.to(tl.int64) * COUNT
    part = (query - piece_query).to(tl.int64) * COUNT
    for slot in range(COUNT):
        chosen = tl.load(routed_ptr + choice + slot) >= 0
        x = _load_rows(part_ptr, (part + slot) * DIM, DIM, TILE_DIM)
        d_q += tl.where(chosen[:, None], x, 0.0).to(tl.float32)
    _store_rows(d_q_ptr, query.to(tl.int64) * DIM, there, d_q, DIM, TILE_DIM)
