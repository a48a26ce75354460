"""The parts that the Triton kernels of the fused backend share.

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

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_offset(head, heads, stride_b, stride_h, UNIT: tl.constexpr):
    """Where a flat head of a strided ``(B, H, L, D)`` tensor begins."""
    batch = head // heads
    return (batch * stride_b + (head - batch * heads) * stride_h) * UNIT


@triton.jit
def rows_offset(
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
def load_rows(ptr, offset, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """``(rows, TILE_DIM)``. Rows are not masked, which costs much: whoever calls clamps them."""
    dim = tl.arange(0, TILE_DIM)
    pointers = ptr + offset[:, None] + dim[None, :]
    if DIM == TILE_DIM:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(ptr, offset, there, x, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Writes the rows ``x`` that are there, in the dtype of the buffer."""
    dim = tl.arange(0, TILE_DIM)
    mask = there[:, None]
    if DIM != TILE_DIM:
        mask = mask & (dim < DIM)[None, :]
    tl.store(ptr + offset[:, None] + dim[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_keys(q, k, v, highest, total, out, factor):
    """One step of online softmax: the keys ``k``, seen by all rows, join ``out``."""
    dots = tl.dot(q, tl.trans(k))
    new_highest = tl.maximum(highest, tl.max(dots, 1) * factor)
    weights = tl.exp2(dots * factor - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return new_highest, total, out


@triton.jit
def add_seen_keys(q, k, v, seen, highest, total, out, factor):
    """`add_keys` where rows see only some of the keys, or none yet."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * factor, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(highest - base)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return new_highest, total, out


@triton.jit
def add_query_grads(q, k, v, grad, lse, delta, seen, d_q, factor, MASKED: tl.constexpr):
    """What the keys ``k`` add to the gradients of the rows ``q``, but for the scale."""
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * factor - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (tl.dot(grad, tl.trans(v)) - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, d_q)


@triton.jit
def add_key_grads(q, k, v, grad, lse, delta, seen, d_k, d_v, factor, MASKED: tl.constexpr):
    """What the rows ``q`` add to the gradients of keys and values; also the scores' gradients."""
    weights = tl.exp2(tl.dot(k, tl.trans(q)) * factor - lse[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_v = tl.dot(weights.to(grad.dtype), grad, d_v)
    d_scores = weights * (tl.dot(v, tl.trans(grad)) - delta[None, :])
    d_scores = d_scores.to(q.dtype)
    return tl.dot(d_scores, q, d_k), d_v, d_scores


@triton.jit
def load_pairs(pair_ptr, start, end, ROWS: tl.constexpr):
    """The pairs of a tile of rows; -1 beyond the end."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pair_ptr + row, mask=row < end, other=-1)


@triton.jit
def clamped_pairs(pair_ptr, start, end, ROWS: tl.constexpr):
    """The pairs of a tile of rows, the last one again beyond the end; and which are there."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pair_ptr + tl.minimum(row, end - 1)), row < end


@triton.jit
def pair_offset(
    pair, first, q_len, stride_h,
    STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Where the queries of pairs begin, in their KV head; ``first`` is the call's first query."""
    query = tl.where(pair >= 0, first + pair // COUNT, 0)
    return rows_offset(query, q_len, stride_h, STRIDE, UNIT, GROUP)


@triton.jit
def rows_of_item(item, block, n_blocks, first_row_ptr, first_item_ptr, item_rows):
    """Which rows an item of a block (counted over all KV heads) holds."""
    bin = block + block // n_blocks
    begin = tl.load(first_row_ptr + bin) + (item - tl.load(first_item_ptr + block)) * item_rows
    return begin, tl.minimum(begin + item_rows, tl.load(first_row_ptr + bin + 1))


@triton.jit
def query_tile_rows(tile, q_len, ROWS: tl.constexpr):
    """Its head, its first row, its rows, the last again beyond the end; and which are there."""
    tiles_per_head = tl.cdiv(q_len, ROWS)
    first_row = tile % tiles_per_head * ROWS
    row = first_row + tl.arange(0, ROWS)
    return tile // tiles_per_head, first_row, tl.minimum(row, q_len - 1), row < q_len


@triton.jit
def key_tile(start, end, KEYS: tl.constexpr):
    """A tile of keys, and the same with the last one again beyond the end."""
    key = start + tl.arange(0, KEYS)
    return key, tl.minimum(key, end - 1).to(tl.int64)


@triton.jit
def sees_own(position, key, BLOCK_SIZE: tl.constexpr):
    """Which keys stand in the own block of each query, and not after it."""
    first = position // BLOCK_SIZE * BLOCK_SIZE
    return (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])


@triton.jit
def own_range(
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
