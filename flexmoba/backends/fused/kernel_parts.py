"""Functions that the Triton kernels of the fused backend share, and their terms.

- A *query* is a flat index, ``(b * Hq + h) * Lq + i``.
- A *pair* is a query and one column of the selection, ``(query - first_query) * COUNT + column``.
- A *bin* is a block of one KV head, ``kv_head * (n_blocks + 1) + block``. The last bin of each KV
  head holds its pairs without a block.
- A *row* is an index into the pairs sorted by bin. ``pair`` and ``bin`` of a row are its pair and
  its bin.
- An *item* is a range of rows of one block that one program processes.

Scores are in base 2: ``factor`` is the scale, which is not negative, divided by ln(2).

Sizes: a matrix product has ROWS queries and KEYS keys. DIM and VALUE_DIM are the head dims;
TILE_DIM and TILE_VALUE_DIM are the next powers of two, but TILE_DIM may be 192. GROUP is the number
of query heads of a KV head, and UNIT is the unit of strides of batch and heads, in elements.

Queries, keys and their gradients are tuples of *parts* of the head dim, because the sizes of a
tensor are powers of two: 192 dims are a part of 128 and one of 64. Other dims are one part.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_offset(head, heads, stride_b, stride_h, UNIT: tl.constexpr):
    """Returns the offset of a flat head in a strided ``(B, H, L, D)`` tensor."""
    batch = head // heads
    return (batch * stride_b + (head - batch * heads) * stride_h) * UNIT


@triton.jit
def rows_offset(
    query, q_len, stride_h, STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr
):
    """Returns the offsets of queries of a KV head from the first query of its first head."""
    if GROUP == 1:
        offset = query.to(tl.int64) * STRIDE
    else:
        head_in_group = query // q_len
        offset = (
            head_in_group * stride_h * UNIT + (query - head_in_group * q_len).to(tl.int64) * STRIDE
        )
    return offset


@triton.jit
def load_rows(ptr, offset, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Loads rows ``(rows, TILE_DIM)``, without a mask over rows.

    Such a mask is slow. The caller clamps rows beyond the end instead.
    """
    dim = tl.arange(0, TILE_DIM)
    pointers = ptr + offset[:, None] + dim[None, :]
    if DIM == TILE_DIM:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(ptr, offset, valid, x, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Writes the valid rows of ``x``, in the dtype of the buffer."""
    dim = tl.arange(0, TILE_DIM)
    mask = valid[:, None]
    if DIM != TILE_DIM:
        mask = mask & (dim < DIM)[None, :]
    tl.store(ptr + offset[:, None] + dim[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_parts(ptr, offset, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Loads rows of queries or keys as `load_rows` does."""
    return (
        (load_rows(ptr, offset, 128, 128), load_rows(ptr + 128, offset, DIM - 128, 64))
        if TILE_DIM == 192
        else (load_rows(ptr, offset, DIM, TILE_DIM),)
    )


@triton.jit
def store_parts(ptr, offset, valid, parts, DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """Writes rows of queries or keys as `store_rows` does."""
    if TILE_DIM == 192:
        store_rows(ptr, offset, valid, parts[0], 128, 128)
        store_rows(ptr + 128, offset, valid, parts[1], DIM - 128, 64)
    else:
        store_rows(ptr, offset, valid, parts[0], DIM, TILE_DIM)


@triton.jit
def zero_parts(ROWS: tl.constexpr, TILE_DIM: tl.constexpr):
    """Returns sums of gradients of queries or keys before the first addition."""
    return (
        (tl.zeros([ROWS, 128], tl.float32), tl.zeros([ROWS, 64], tl.float32))
        if TILE_DIM == 192
        else (tl.zeros([ROWS, TILE_DIM], tl.float32),)
    )


@triton.jit
def pairs_of_parts(x, y):
    """Returns the parts of ``x``, each with that of ``y``."""
    return ((x[0], y[0]),) if len(x) == 1 else ((x[0], y[0]), (x[1], y[1]))


@triton.jit
def dot_parts(x, y, PRECISION: tl.constexpr = None):
    """Returns the inner products of rows of ``x`` with rows of ``y``, over all parts.

    PRECISION is Triton's ``input_precision``, of products in single precision.
    """
    dots = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(x)):
        dots = tl.dot(x[i], tl.trans(y[i]), dots, input_precision=PRECISION)
    return dots


@triton.jit
def add_dots(weights, x, sums):
    """Adds sums of rows of ``x``, with weights, to ``sums``."""
    return [tl.dot(weights, pair[0], pair[1]) for pair in pairs_of_parts(x, sums)]


@triton.jit
def add_parts(x, y):
    """Returns ``x + y``."""
    return [pair[0] + pair[1] for pair in pairs_of_parts(x, y)]


@triton.jit
def scale_parts(x, scale):
    """Returns ``x * scale``."""
    return [part * scale for part in x]


@triton.jit
def keep_rows(x, kept):
    """Returns ``x`` with zeros in rows that are not kept."""
    return [tl.where(kept[:, None], part, 0.0) for part in x]


@triton.jit
def choose_rows(chosen, x, y):
    """Returns the chosen rows of ``x``, and the others of ``y``."""
    return [tl.where(chosen[:, None], pair[0], pair[1]) for pair in pairs_of_parts(x, y)]


@triton.jit
def add_keys(q, k, v, highest, total, out, factor):
    """Adds keys that all rows see to the state of the online softmax."""
    dots = dot_parts(q, k)
    new_highest = tl.maximum(highest, tl.max(dots, 1) * factor)
    weights = tl.exp2(dots * factor - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return new_highest, total, out


@triton.jit
def add_visible_keys(q, k, v, visible, highest, total, out, factor):
    """Computes `add_keys` for rows that see only some of the keys, or have seen none yet."""
    scores = tl.where(visible, dot_parts(q, k) * factor, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(highest - base)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return new_highest, total, out


@triton.jit
def add_query_grads(q, k, v, grad, lse, delta, visible, d_q, factor, MASKED: tl.constexpr):
    """Adds the contribution of keys to the gradients of queries; the caller applies the scale."""
    weights = tl.exp2(dot_parts(q, k) * factor - lse[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    d_scores = weights * (tl.dot(grad, tl.trans(v)) - delta[:, None])
    return add_dots(d_scores.to(v.dtype), k, d_q)


@triton.jit
def add_key_grads(q, k, v, grad, lse, delta, visible, d_k, d_v, factor, MASKED: tl.constexpr):
    """Adds the contribution of queries to the gradients of keys and values.

    Returns both, and the gradients of the scores.
    """
    weights = tl.exp2(dot_parts(k, q) * factor - lse[None, :])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    d_v = tl.dot(weights.to(grad.dtype), grad, d_v)
    d_scores = weights * (tl.dot(v, tl.trans(grad)) - delta[None, :])
    d_scores = d_scores.to(v.dtype)
    return add_dots(d_scores, q, d_k), d_v, d_scores


@triton.jit
def load_pairs(pair_ptr, start, end, ROWS: tl.constexpr):
    """Loads the pairs of a tile of rows; -1 beyond the end."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pair_ptr + row, mask=row < end, other=-1)


@triton.jit
def clamped_pairs(pair_ptr, start, end, ROWS: tl.constexpr):
    """Loads the pairs of a tile of rows, clamped to the last one, and a mask of valid rows."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pair_ptr + tl.minimum(row, end - 1)), row < end


@triton.jit
def pair_offset(
    pair, first, q_len, stride_h,
    STRIDE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Returns the offsets of the queries of pairs within their KV head.

    ``first`` is the first query of the sort group, counted from the first query of the KV head.
    """
    query = tl.where(pair >= 0, first + pair // COUNT, 0)
    return rows_offset(query, q_len, stride_h, STRIDE, UNIT, GROUP)


@triton.jit
def rows_of_item(item, block, n_blocks, first_row_ptr, first_item_ptr, item_rows):
    """Returns the range of rows of an item; its block is counted over all KV heads."""
    bin = block + block // n_blocks
    begin = tl.load(first_row_ptr + bin) + (item - tl.load(first_item_ptr + block)) * item_rows
    return begin, tl.minimum(begin + item_rows, tl.load(first_row_ptr + bin + 1))


@triton.jit
def query_tile_rows(tile, q_len, ROWS: tl.constexpr):
    """Returns the head, the first row, the clamped rows and the valid rows of a tile of queries.

    Here a row is the position of a query in its head.
    """
    tiles_per_head = tl.cdiv(q_len, ROWS)
    first_row = tile % tiles_per_head * ROWS
    row = first_row + tl.arange(0, ROWS)
    return tile // tiles_per_head, first_row, tl.minimum(row, q_len - 1), row < q_len


@triton.jit
def key_tile(start, end, KEYS: tl.constexpr):
    """Returns the keys of a tile, and the same keys clamped to the last one."""
    key = start + tl.arange(0, KEYS)
    return key, tl.minimum(key, end - 1).to(tl.int64)


@triton.jit
def sees_in_own_block(position, key, BLOCK_SIZE: tl.constexpr):
    """Returns which keys are in the own block of each query, at or before its position."""
    first = position // BLOCK_SIZE * BLOCK_SIZE
    return (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])


@triton.jit
def own_range(
    first_row, q_len, kv_len, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Returns the range of keys in the own blocks of a tile of queries.

    These are the first key, the end of the tiles of keys that all queries see completely, and the
    last key.
    """
    first_position = first_row + kv_len - q_len
    last_position = tl.minimum(first_row + ROWS, q_len) - 1 + kv_len - q_len
    first_key = first_position // BLOCK_SIZE * BLOCK_SIZE
    full_end = first_key
    if first_key == last_position // BLOCK_SIZE * BLOCK_SIZE:  # all queries in one block
        full_end += (first_position + 1 - first_key) // KEYS * KEYS
    return first_key, full_end, last_position
