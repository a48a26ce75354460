"""Triton kernels for a decoding step of Native Sparse Attention, in launch order.

`compressed_kernel` divides the compressed keys that a query sees evenly among ``CMP_PARTS``
programs. Each writes the scores of its keys and a partial output. `select_kernel` divides the
blocks into ``SPLITS`` splits, adds the softmax weights of the scores, and keeps the best blocks of
each split. Each program of `attend_kernel` attends to ``CHUNK`` keys of one selected block or of
the window, which makes one partial output. `merge_kernel` merges the partial outputs of each
branch, and adds the branches, multiplied by their gate values.

A *unit* is a query of one KV head, ``(b * Hkv + KV head) * Lq + i``. Its query heads are the ROWS
of the matrix products. Query ``i`` of head ``h`` and batch row ``b`` is row ``(b * Hq + h) * Lq +
i``. Scores inside the kernels are in units of log2.
"""

import math

import triton
import triton.language as tl

from flexmoba.cache.select_kernel import forced_block
from flexmoba.gate.kernel import NOTHING, keep_best, nothing_yet
from flexmoba.runtime.triton_launch import kernel

_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _rows_of(unit, GROUP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr):
    """Returns the row of each query head of a unit, and which of the ROWS are heads."""
    head = tl.arange(0, ROWS)
    row = (unit // Q_LEN).to(tl.int64) * GROUP + tl.minimum(head, GROUP - 1)
    return row * Q_LEN + unit % Q_LEN, head < GROUP


@triton.jit
def _position_of(positions_ptr, unit, kv_heads, Q_LEN: tl.constexpr):
    """Returns the position of the query of a unit."""
    return tl.load(positions_ptr + unit // Q_LEN // kv_heads * Q_LEN + unit % Q_LEN)


@triton.jit
def _seen_end(position, n_compressed, STRIDE: tl.constexpr, IN_COMPRESSED: tl.constexpr):
    """Returns the number of compressed blocks that end at or before a position."""
    end = (position + 1) // STRIDE - (IN_COMPRESSED - 1)
    return tl.minimum(tl.maximum(end, 0), n_compressed)


@triton.jit
def _add_keys(q, k, v, is_key, highest, total, out, factor):
    """Adds the attention to a tile of keys; returns the scores and the new state."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    score = tl.where(is_key[None, :], score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weight = tl.exp2(score - base[:, None])
    decay = tl.exp2(highest - base)
    total = total * decay + tl.sum(weight, 1)
    out = out * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return score, new_highest, total, out


@triton.jit
def _load_keys(ptr, token, is_key, DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Loads the keys or values of tokens, zeros for others, whose values may be NaN."""
    dim = tl.arange(0, TILE_D)
    mask = is_key[:, None] & (dim < DIM)[None, :]
    return tl.load(ptr + token.to(tl.int64)[:, None] * DIM + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _store_partial(
    partial_out_ptr, partial_lse_ptr, partial, is_head, highest, total, out,
    VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Writes the partial output of every head, and its log-sum-exp."""
    value_dim = tl.arange(0, TILE_VALUE_D)
    tl.store(partial_lse_ptr + partial, highest + tl.log2(total), mask=is_head)
    tl.store(
        partial_out_ptr + partial[:, None] * VALUE_DIM + value_dim[None, :],
        out * (1.0 / total)[:, None],
        mask=is_head[:, None] & (value_dim < VALUE_DIM)[None, :],
    )


@kernel
def compressed_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, score_ptr, partial_out_ptr, partial_lse_ptr,
    kv_heads: tl.int32, n_compressed: tl.int32, factor: tl.float32,
    GROUP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, STRIDE: tl.constexpr,
    IN_COMPRESSED: tl.constexpr, CMP_PARTS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Attends from one unit to a share of the compressed keys, and writes their scores."""
    part, unit = tl.program_id(0) % CMP_PARTS, tl.program_id(0) // CMP_PARTS
    position = _position_of(positions_ptr, unit, kv_heads, Q_LEN)
    end = _seen_end(position, n_compressed, STRIDE, IN_COMPRESSED)
    # Shares are multiples of KEYS, so that no tile of keys belongs to two of them.
    share = tl.cdiv(tl.cdiv(end, KEYS), CMP_PARTS) * KEYS
    first, last = part * share, tl.minimum((part + 1) * share, end)
    row, is_head = _rows_of(unit, GROUP, ROWS, Q_LEN)
    partial = row * PARTS + part
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    if first >= last:
        tl.store(partial_lse_ptr + partial, highest, mask=is_head)
        return
    dim = tl.arange(0, TILE_D)
    q = tl.load(q_ptr + row[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    kv_head = (unit // Q_LEN).to(tl.int64)
    k_ptr += kv_head * (n_compressed + 1) * DIM  # the last one is never read
    v_ptr += kv_head * (n_compressed + 1) * VALUE_DIM
    score_row = (unit.to(tl.int64) * GROUP + tl.arange(0, ROWS)) * n_compressed
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, TILE_VALUE_D], tl.float32)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < last
        k = _load_keys(k_ptr, key, is_key, DIM, TILE_D)
        v = _load_keys(v_ptr, key, is_key, VALUE_DIM, TILE_VALUE_D)
        score, highest, total, out = _add_keys(q, k, v, is_key, highest, total, out, factor)
        mask = is_head[:, None] & is_key[None, :]
        tl.store(score_ptr + score_row[:, None] + key[None, :], score, mask=mask)
    _store_partial(
        partial_out_ptr, partial_lse_ptr, partial, is_head, highest, total, out,
        VALUE_DIM, TILE_VALUE_D,
    )  # fmt: skip


@triton.jit
def _weights(score_ptr, score_row, compressed, is_head, seen, lse):
    """Returns the softmax weights of compressed blocks, summed over the heads of a unit."""
    mask = is_head[:, None] & seen[None, :]
    score = tl.load(
        score_ptr + score_row[:, None] + compressed[None, :], mask=mask, other=float("-inf")
    )
    return tl.sum(tl.where(mask, tl.exp2(score - lse[:, None]), 0.0), 0)


@kernel
def select_kernel(
    score_ptr, partial_lse_ptr, positions_ptr, best_ptr,
    kv_heads: tl.int32, n_compressed: tl.int32, n_blocks: tl.int32,
    GROUP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, STRIDE: tl.constexpr,
    IN_BLOCK: tl.constexpr, IN_COMPRESSED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr, LOCALS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, TILE_BLOCKS: tl.constexpr, ROOM: tl.constexpr,
    CMP_PARTS: tl.constexpr, ALL_CMP_PARTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Keeps the most important blocks of one split for one unit.

    A tile has ROOM places for the compressed blocks that begin in each of TILE_BLOCKS blocks.
    """
    split, unit = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    position = _position_of(positions_ptr, unit, kv_heads, Q_LEN)
    seen_end = _seen_end(position, n_compressed, STRIDE, IN_COMPRESSED)
    row, is_head = _rows_of(unit, GROUP, ROWS, Q_LEN)
    part = tl.arange(0, ALL_CMP_PARTS)[None, :]
    lse = tl.load(
        partial_lse_ptr + row[:, None] * PARTS + part, mask=part < CMP_PARTS, other=float("-inf")
    )
    highest = tl.max(lse, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    lse = highest + tl.log2(tl.sum(tl.exp2(lse - highest[:, None]), 1))
    score_row = (unit.to(tl.int64) * GROUP + tl.arange(0, ROWS)) * n_compressed
    candidates_end = tl.minimum(tl.maximum(position, 0) // BLOCK_SIZE, n_blocks) - LOCALS
    slot, best = nothing_yet(1, COUNT, SLOTS)
    place, in_block = tl.arange(0, TILE_BLOCKS * ROOM), tl.arange(0, ROOM)
    end = tl.minimum(candidates_end, (split + 1) * SPLIT)
    for start in range(split * SPLIT, end, TILE_BLOCKS):
        block = start + tl.arange(0, TILE_BLOCKS)
        # Every block sums its overlaps, in strides, in the same order, so that equal weights give
        # equal importances: first those of the compressed blocks that begin in the block.
        compressed = (start + place // ROOM) * IN_BLOCK + place % ROOM
        seen = (place % ROOM < IN_BLOCK) & (compressed < seen_end)
        weight = _weights(score_ptr, score_row, compressed, is_head, seen, lse)
        overlap = tl.minimum(in_block + IN_COMPRESSED, IN_BLOCK) - in_block
        weight = tl.reshape(weight, [TILE_BLOCKS, ROOM])
        importance = tl.sum(weight * overlap.to(tl.float32)[None, :], 1)
        for before in tl.static_range(1, IN_COMPRESSED):
            compressed = block * IN_BLOCK - before
            seen = (compressed >= 0) & (compressed < seen_end)
            weight = _weights(score_ptr, score_row, compressed, is_head, seen, lse)
            importance += weight * tl.minimum(IN_COMPRESSED - before, IN_BLOCK)
        # Importances are not negative, so their bits are in the order of their values.
        bits = importance.to(tl.int32, bitcast=True)
        bits = tl.where(importance != importance, 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) | block.to(tl.int64)
        is_scored = (block >= SINKS) & (block < candidates_end)
        best = keep_best(best, tl.where(is_scored, key, NOTHING)[None, :])
    best = tl.where(slot < COUNT, best, NOTHING)
    tl.store(best_ptr + (unit.to(tl.int64) * SPLITS + split) * SLOTS + slot, best)


@triton.jit
def _selected_block(
    column, own, best_ptr, SINKS: tl.constexpr, LOCALS: tl.constexpr, COUNT: tl.constexpr,
    SLOTS: tl.constexpr, SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr,
):  # fmt: skip
    """Returns the block in a column of the selection of one query; -1 for none.

    The columns are the own block ``own`` (-1 for padding), local blocks, sink blocks, and the
    ``COUNT`` blocks of the highest scores among the best blocks of all splits at ``best_ptr``.
    """
    block, rank = forced_block(column, own, SINKS, LOCALS), column - (1 + LOCALS + SINKS)
    if COUNT > 0:  # a constexpr, so a separate condition
        if rank >= 0:
            index = tl.arange(0, ALL_SPLITS * SLOTS)
            keys = tl.load(best_ptr + index, mask=index < SPLITS * SLOTS, other=NOTHING)
            keys = tl.sort(keys, descending=True)
            ranked_key = tl.max(tl.where(index == rank, keys, NOTHING), 0)
            exists = (own >= 0) & (ranked_key >= NOTHING + SLOTS)
            block = tl.where(exists, (ranked_key & 0xFFFFFFFF).to(tl.int32), -1)
    return block


@kernel
def attend_kernel(
    q_ptr, k_ptr, v_ptr, k_win_ptr, v_win_ptr, positions_ptr, best_ptr, partial_out_ptr,
    partial_lse_ptr, kv_heads: tl.int32, n_blocks: tl.int32, factor: tl.float32,
    GROUP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr, LOCALS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr,
    SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CMP_PARTS: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Attends from one unit to at most ``CHUNK`` keys of a selected block or of the window."""
    part = tl.program_id(0) % (PARTS - CMP_PARTS)
    unit = tl.program_id(0) // (PARTS - CMP_PARTS)
    position = _position_of(positions_ptr, unit, kv_heads, Q_LEN)
    kv_head = (unit // Q_LEN).to(tl.int64)
    is_window = part >= COLUMNS * CHUNKS
    if is_window:
        first = tl.maximum(position + 1 - WINDOW, 0) + (part - COLUMNS * CHUNKS) * CHUNK
        last = tl.minimum(first + CHUNK, position + 1)
        k_ptr = k_win_ptr + kv_head * (RING + 1) * DIM
        v_ptr = v_win_ptr + kv_head * (RING + 1) * VALUE_DIM
    else:
        own = tl.where(position < n_blocks * BLOCK_SIZE, position // BLOCK_SIZE, -1)
        own = tl.where(position >= 0, own, -1)
        best_ptr += unit.to(tl.int64) * (SPLITS * SLOTS)
        block = _selected_block(
            part // CHUNKS, own, best_ptr, SINKS, LOCALS, COUNT, SLOTS, SPLITS, ALL_SPLITS
        )
        first = tl.maximum(block, 0) * BLOCK_SIZE + part % CHUNKS * CHUNK
        last = tl.minimum(tl.minimum(first + CHUNK, (block + 1) * BLOCK_SIZE), position + 1)
        k_ptr += kv_head * ((n_blocks + 1) * BLOCK_SIZE) * DIM
        v_ptr += kv_head * ((n_blocks + 1) * BLOCK_SIZE) * VALUE_DIM
    row, is_head = _rows_of(unit, GROUP, ROWS, Q_LEN)
    partial = row * PARTS + CMP_PARTS + part
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    if first >= last:
        tl.store(partial_lse_ptr + partial, highest, mask=is_head)
        return
    dim = tl.arange(0, TILE_D)
    q = tl.load(q_ptr + row[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, TILE_VALUE_D], tl.float32)
    for start in range(first, last, KEYS):
        token = start + tl.arange(0, KEYS)
        is_key = token < last
        slot = tl.where(is_window, token % RING, token)
        k = _load_keys(k_ptr, slot, is_key, DIM, TILE_D)
        v = _load_keys(v_ptr, slot, is_key, VALUE_DIM, TILE_VALUE_D)
        _, highest, total, out = _add_keys(q, k, v, is_key, highest, total, out, factor)
    _store_partial(
        partial_out_ptr, partial_lse_ptr, partial, is_head, highest, total, out,
        VALUE_DIM, TILE_VALUE_D,
    )  # fmt: skip


@triton.jit
def _lse_of(lse, in_branch):
    """Returns the log-sum-exp of the partial outputs of a branch."""
    lse = tl.where(in_branch, lse, float("-inf"))
    highest = tl.max(lse, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    return highest + tl.log2(tl.sum(tl.exp2(lse - highest), 0))


@kernel
def merge_kernel(
    partial_out_ptr, partial_lse_ptr, gates_ptr, positions_ptr, out_ptr, lse_ptr,
    kv_heads: tl.int32, n_blocks: tl.int32,
    GROUP: tl.constexpr, Q_LEN: tl.constexpr, GATE_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CMP_PARTS: tl.constexpr, PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr, SOME_PARTS: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Merges the partial outputs of one row by branch, and adds the branches by gate values."""
    row = tl.program_id(0).to(tl.int64)
    head, query = row // Q_LEN, row % Q_LEN  # b * Hq + query head
    heads = GROUP * kv_heads
    batch = head // heads
    position = tl.load(positions_ptr + batch * Q_LEN + query)
    gates_ptr += ((batch * GATE_HEADS + head % heads % GATE_HEADS) * Q_LEN + query) * 3
    gate_0 = tl.load(gates_ptr).to(tl.float32)
    gate_1 = tl.load(gates_ptr + 1).to(tl.float32)
    gate_2 = tl.load(gates_ptr + 2).to(tl.float32)
    WINDOW_PART: tl.constexpr = CMP_PARTS + COLUMNS * CHUNKS
    index = tl.arange(0, ALL_PARTS)
    partial_lse_ptr += row * PARTS
    lse = tl.load(partial_lse_ptr + index, mask=index < PARTS, other=float("-inf"))
    lse_0 = _lse_of(lse, index < CMP_PARTS)
    lse_1 = _lse_of(lse, (index >= CMP_PARTS) & (index < WINDOW_PART))
    lse_2 = _lse_of(lse, index >= WINDOW_PART)
    value_dim = tl.arange(0, TILE_VALUE_D)
    out = tl.zeros([TILE_VALUE_D], tl.float32)
    for start in range(0, PARTS, SOME_PARTS):
        part = start + tl.arange(0, SOME_PARTS)
        part_lse = tl.load(partial_lse_ptr + part, mask=part < PARTS, other=float("-inf"))
        has_keys = (part_lse > float("-inf")) | (part_lse != part_lse)
        x = tl.load(
            partial_out_ptr + (row * PARTS + part)[:, None] * VALUE_DIM + value_dim[None, :],
            mask=has_keys[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,  # the partial output of no keys was never written
        )
        branch_lse = tl.where(part < WINDOW_PART, tl.where(part < CMP_PARTS, lse_0, lse_1), lse_2)
        gate = tl.where(part < WINDOW_PART, tl.where(part < CMP_PARTS, gate_0, gate_1), gate_2)
        weight = tl.where(has_keys, gate * tl.exp2(part_lse - branch_lse), 0.0)
        out += tl.sum(x * weight[:, None], 0)
    out = tl.where(position < 0, 0.0, out)  # gate values may be NaN there
    beyond = position >= n_blocks * BLOCK_SIZE
    out = tl.where(beyond, float("nan"), out)
    offset = row * VALUE_DIM + value_dim
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=value_dim < VALUE_DIM)
    lse_ptr += row * 3
    tl.store(lse_ptr, tl.where(beyond, float("nan"), lse_0 * _LN_2))
    tl.store(lse_ptr + 1, tl.where(beyond, float("nan"), lse_1 * _LN_2))
    tl.store(lse_ptr + 2, tl.where(beyond, float("nan"), lse_2 * _LN_2))
