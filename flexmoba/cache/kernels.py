"""Triton kernels for a decoding step, in launch order: score, select, attend, merge.

`_score_kernel` divides the blocks into ``SPLITS`` splits of ``SPLIT`` blocks, which it scores in
parallel, and keeps the best blocks of each split. `select_best_on_cuda` selects among the best
blocks of all splits. Each program of `_attend_kernel` attends to ``CHUNK`` keys of one selected
block, which makes one partial output. `merge_kernel` merges the partial outputs.

Query ``i`` of head ``h`` and batch row ``b`` is row ``(b * Hq + h) * Lq + i``. Scores inside the
kernels are in units of log2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.cache.options import CachedCall
from flexmoba.cache.select_kernel import select_best_on_cuda
from flexmoba.gate.kernel import (
    NOTHING,
    merge_best,
    only_candidates,
    scores_of,
    sort_keys,
    without_copies,
)
from flexmoba.runtime.triton_launch import kernel, launch, on_device_of, packed

MAX_TOPK = 64

_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_SPLIT, _MOST_SPLITS = 128, 16  # mean keys of a split, and splits
_TILE_Q, _TILE_N = 16, 32  # queries and blocks that a program scores at a time
_STAGES = 3  # of which two are tiles in shared memory
_KEYS, _CHUNK = 64, 256  # measured on one NVIDIA H200


def attend_step_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    gate_rows: Tensor,
    call: CachedCall,
) -> tuple[Tensor, Tensor]:
    """Computes `attend_step` by Triton kernels."""
    n_blocks = means.shape[2] // call.gate.sub_blocks
    selected = select_step_on_cuda(gate_rows, means, positions, call)
    return attend_to_selected_on_cuda(q, k, v, positions, selected, n_blocks, call)


def select_step_on_cuda(
    gate_rows: Tensor, means: Tensor, positions: Tensor, call: CachedCall
) -> Tensor:
    """Selects the blocks of each row of the gate, for the arguments of `attend_step`.

    Returns:
        Block indices, ``(B, Hq or Hkv, Lq, topk)`` int32: the own block, local blocks, sink blocks,
        then the others by descending score; -1 for none.
    """
    batch, heads, q_len, dim = gate_rows.shape
    kv_heads, n_blocks = means.shape[1], means.shape[2] // call.gate.sub_blocks
    gate_rows, means, positions = (packed(x) for x in (gate_rows, means, positions))
    group = heads // kv_heads
    constants = score_constants(gate_rows, means, n_blocks, group * q_len, call) | {
        "Q_LEN": q_len,
        "GATE_GROUP": group,
        "DIM": dim,
        "TILE_D": max(16, next_power_of_2(dim)),
    }
    shape = batch, heads, q_len, constants["SPLITS"], constants["SLOTS"]
    best = torch.empty(shape, dtype=torch.int64, device=means.device)
    if call.scored > 0:
        tiles = ceil_div(group * q_len, constants["TILE_Q"])
        n_programs = batch * kv_heads * constants["SPLITS"] * tiles
        arguments = (gate_rows, means, positions, best, kv_heads, n_blocks)
        with on_device_of(means):
            launch(_score_kernel, n_programs, arguments, constants, (gate_rows.dtype, means.dtype))
    return select_best_on_cuda(best, positions, n_blocks, call)


def attend_to_selected_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    selected: Tensor,
    n_blocks: int,
    call: CachedCall,
) -> tuple[Tensor, Tensor]:
    """Attends from each query to its selected blocks, of which the first is its own.

    Args:
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, N * block_size, D)``.
        v: ``(B, Hkv, N * block_size, Dv)``.
        positions: Position of each query, ``(B, Lq)`` int32, as in `attend_step`.
        selected: Indices of the blocks of k and v, ``(B, Hq or Hkv, Lq, topk)`` int32; -1 for none.
        n_blocks: Blocks of a sequence. Results of queries whose positions are beyond are NaN.
        call: Options.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    q, k, v, positions, selected = (packed(x) for x in (q, k, v, positions, selected))
    rows, chunks = batch * heads * q_len, ceil_div(call.block_size, _CHUNK)
    n_partials = call.topk * chunks
    constants = {
        "GROUP": heads // kv_heads,
        "GATE_GROUP": selected.shape[1] // kv_heads,
        "Q_LEN": q_len,
        "BLOCK_SIZE": call.block_size,
        "CHUNK": _CHUNK,
        "CHUNKS": chunks,
        "PARTS": n_partials,
        "ALL_PARTS": next_power_of_2(n_partials),
        "SOME_PARTS": min(32, next_power_of_2(n_partials)),
        "KEYS": _KEYS,
        "DIM": dim,
        "TILE_D": max(16, next_power_of_2(dim)),
        "VALUE_DIM": value_dim,
        "TILE_VALUE_D": max(16, next_power_of_2(value_dim)),
        "num_warps": 4,
    }
    dtypes = (q.dtype,)
    partial_out = torch.empty(rows, n_partials, value_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(rows, n_partials, dtype=torch.float32, device=q.device)
    out = q.new_empty(batch, heads, q_len, value_dim)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    inputs, partials = (q, k, v, positions, selected), (partial_out, partial_lse)
    numbers = kv_heads, k.shape[2] // call.block_size, call.scale / math.log(2)
    merged = (*partials, positions, out, lse, kv_heads, n_blocks)
    with on_device_of(q):
        arguments = (*inputs, *partials, *numbers)
        launch(_attend_kernel, rows * n_partials, arguments, constants, dtypes)
        launch(merge_kernel, rows, merged, constants, dtypes)
    return out, lse


def split_size(n_blocks: int, sub_blocks: int, tile_n: int) -> int:
    """Returns the number of blocks in a split: 128 mean keys or more, and at least one tile."""
    least = max(tile_n, next_power_of_2(ceil_div(_LEAST_SPLIT, sub_blocks)))
    return max(least, next_power_of_2(ceil_div(n_blocks, _MOST_SPLITS)))


def score_constants(
    rows: Tensor, means: Tensor, n_blocks: int, queries: int, call: CachedCall
) -> dict[str, int]:
    """Returns the constants of a kernel that keeps the best blocks of each split.

    Args:
        rows: Rows of the gate, ``(..., D)``.
        means: Mean keys, ``(..., D)``.
        n_blocks: Blocks of a sequence.
        queries: Rows of the gate that score the same mean keys.
        call: Options of the call.
    """
    gate, is_half = call.gate, rows.element_size() == 2
    slots = next_power_of_2(max(2, call.scored))  # at least 2 for `tl.topk`
    # Products of float32 would take too many registers with more blocks or fewer warps.
    tile_n = max(_TILE_N, slots) if is_half else _TILE_N
    split = split_size(n_blocks, gate.sub_blocks, tile_n)
    splits = ceil_div(n_blocks, split)
    return {
        "BY_PARTS": rows.dtype == torch.float32 and means.dtype != torch.float32,
        "SINKS": gate.sink_blocks,
        "LOCALS": gate.local_blocks,
        "SUB_BLOCKS": gate.sub_blocks,
        "COUNT": call.scored,
        "SLOTS": slots,
        "SPLIT": split,
        "SPLITS": splits,
        "TILE_Q": _TILE_Q,
        "ROWS": min(_TILE_Q, next_power_of_2(queries)),
        "TILE_N": tile_n,
        "STAGES": _STAGES,
        "BLOCK_SIZE": call.block_size,
        "num_warps": 1 if is_half else 4,
    }


@kernel
def _score_kernel(
    q_ptr, means_ptr, positions_ptr, best_ptr, kv_heads: tl.int32, n_blocks: tl.int32,
    GATE_GROUP: tl.constexpr, BY_PARTS: tl.constexpr, SINKS: tl.constexpr, LOCALS: tl.constexpr,
    SUB_BLOCKS: tl.constexpr, Q_LEN: tl.constexpr, SLOTS: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, TILE_Q: tl.constexpr, ROWS: tl.constexpr, TILE_N: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Keeps the best blocks of one split for a tile of queries of one KV head."""
    tiles: tl.constexpr = (GATE_GROUP * Q_LEN + TILE_Q - 1) // TILE_Q
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % tiles
    kv_head = tl.program_id(0) // (SPLITS * tiles)  # b * Hkv + KV head
    query = tile * TILE_Q + tl.arange(0, ROWS)
    copy = tl.minimum(tile * TILE_Q + tl.arange(0, TILE_Q) % ROWS, GATE_GROUP * Q_LEN - 1)
    is_query = query < GATE_GROUP * Q_LEN
    query = tl.minimum(query, GATE_GROUP * Q_LEN - 1)
    position = tl.load(positions_ptr + kv_head // kv_heads * Q_LEN + query % Q_LEN)
    first = tl.full([ROWS], SINKS, tl.int32)
    candidates_end = tl.minimum(tl.maximum(position, 0) // BLOCK_SIZE, n_blocks) - LOCALS
    first_row = kv_head.to(tl.int64) * (GATE_GROUP * Q_LEN)
    dim = tl.arange(0, TILE_D)
    in_dim = (dim < DIM)[None, :]
    q = tl.load(q_ptr + (first_row + copy)[:, None] * DIM + dim[None, :], mask=in_dim, other=0.0)
    means_ptr += kv_head.to(tl.int64) * (n_blocks * SUB_BLOCKS) * DIM + dim[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full([ROWS, SLOTS], NOTHING, tl.int64)
    lowest = tl.full([TILE_Q, TILE_N], float("-inf"), tl.float32)
    score = lowest
    end = tl.minimum(tl.max(candidates_end, 0), (split + 1) * SPLIT)
    n_tiles = tl.cdiv(tl.maximum(end - split * SPLIT, 0), TILE_N)
    for i in tl.range(0, n_tiles * SUB_BLOCKS, num_stages=STAGES):
        block, sub_block = split * SPLIT + i // SUB_BLOCKS * TILE_N, i % SUB_BLOCKS
        block += tl.arange(0, TILE_N)
        mean_ptr = means_ptr + (block * SUB_BLOCKS + sub_block)[:, None] * DIM
        mask = (block < n_blocks)[:, None] & in_dim
        new = scores_of(q, tl.load(mean_ptr, mask=mask, other=0.0), BY_PARTS)
        score = tl.maximum(score, new, tl.PropagateNan.ALL)
        if sub_block == SUB_BLOCKS - 1:
            keys = sort_keys(without_copies(score, ROWS), block)
            best = merge_best(best, only_candidates(keys, block, first, candidates_end))
            score = lowest
    offset = ((first_row + query) * SPLITS + split) * SLOTS
    tl.store(best_ptr + offset[:, None] + slot, best, mask=is_query[:, None])


@triton.jit
def attend_to_keys(
    q, k_ptr, v_ptr, n_keys, factor, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Returns the attention of one query to ``n_keys`` keys, and its log-sum-exp in log2."""
    dim, value_dim = tl.arange(0, TILE_D), tl.arange(0, TILE_VALUE_D)
    highest, total = float("-inf"), 0.0
    out = tl.zeros([TILE_VALUE_D], tl.float32)
    for start in range(0, n_keys, KEYS):
        key = start + tl.arange(0, KEYS)
        token = tl.minimum(key, n_keys - 1)[:, None]
        k = tl.load(k_ptr + token * K_STRIDE + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        mask = (value_dim < VALUE_DIM)[None, :]
        v = tl.load(v_ptr + token * V_STRIDE + value_dim[None, :], mask=mask, other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * factor
        scores = tl.where(key < n_keys, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - base)
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weights, 0)
        out = out * decay + tl.sum(weights[:, None] * v.to(tl.float32), 0)
        highest = new_highest
    return out * (1.0 / total), highest + tl.log2(total)


@kernel
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, selected_ptr, partial_out_ptr, partial_lse_ptr,
    kv_heads: tl.int32, n_blocks: tl.int32, factor: tl.float32,
    GROUP: tl.constexpr, GATE_GROUP: tl.constexpr, Q_LEN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Attends from one query to at most ``CHUNK`` keys of one of its selected blocks."""
    partial = tl.program_id(0).to(tl.int64)
    row = partial // PARTS
    chunk, column = tl.program_id(0) % CHUNKS, tl.program_id(0) % PARTS // CHUNKS
    head = row // Q_LEN  # b * Hq + query head
    gate_row = head // (GROUP // GATE_GROUP) * Q_LEN + row % Q_LEN
    block = tl.load(selected_ptr + gate_row * (PARTS // CHUNKS) + column)
    position = tl.load(positions_ptr + head // (GROUP * kv_heads) * Q_LEN + row % Q_LEN)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, keys_of_block(column, position, BLOCK_SIZE))
    if (block < 0) | (first >= end):
        tl.store(partial_lse_ptr + partial, float("-inf"))
        return
    dim, value_dim = tl.arange(0, TILE_D), tl.arange(0, TILE_VALUE_D)
    q = tl.load(q_ptr + row * DIM + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    first_key = (head // GROUP * n_blocks + block) * BLOCK_SIZE + first
    out, lse = attend_to_keys(
        q, k_ptr + first_key * DIM, v_ptr + first_key * VALUE_DIM, end - first, factor,
        DIM, VALUE_DIM, KEYS, DIM, TILE_D, VALUE_DIM, TILE_VALUE_D,
    )  # fmt: skip
    tl.store(partial_lse_ptr + partial, lse)
    offset = partial * VALUE_DIM + value_dim
    tl.store(partial_out_ptr + offset, out, mask=value_dim < VALUE_DIM)


@triton.jit
def keys_of_block(column, position, BLOCK_SIZE: tl.constexpr):
    """Returns how many keys of the block in a column of the selection a query attends to.

    The first column is the own block. All other blocks are past blocks.
    """
    return tl.where(column == 0, position % BLOCK_SIZE + 1, BLOCK_SIZE)


@kernel
def merge_kernel(
    partial_out_ptr, partial_lse_ptr, positions_ptr, out_ptr, lse_ptr,
    kv_heads: tl.int32, n_blocks: tl.int32,
    GROUP: tl.constexpr, Q_LEN: tl.constexpr, BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr, SOME_PARTS: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Merges the partial outputs of one query, weighted by their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row // (Q_LEN * GROUP * kv_heads) * Q_LEN + row % Q_LEN)
    index = tl.arange(0, ALL_PARTS)
    partial_lse_ptr += row * PARTS
    all_lse = tl.load(partial_lse_ptr + index, mask=index < PARTS, other=float("-inf"))
    highest = tl.max(all_lse, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(all_lse - highest), 0)
    value_dim = tl.arange(0, TILE_VALUE_D)
    out = tl.zeros([TILE_VALUE_D], tl.float32)
    for start in range(0, PARTS, SOME_PARTS):
        partial = start + tl.arange(0, SOME_PARTS)
        partial_lse = tl.load(partial_lse_ptr + partial, mask=partial < PARTS, other=float("-inf"))
        has_keys = partial_lse > float("-inf")
        has_keys = has_keys | (partial_lse != partial_lse)
        x = tl.load(
            partial_out_ptr + (row * PARTS + partial)[:, None] * VALUE_DIM + value_dim[None, :],
            mask=has_keys[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,  # the partial output of no keys was never written
        )
        out += tl.sum(x * tl.exp2(partial_lse - highest)[:, None], 0)
    out *= 1.0 / tl.where(total == 0.0, 1.0, total)
    lse = (highest + tl.log2(total)) * _LN_2
    beyond = position >= n_blocks * BLOCK_SIZE
    out = tl.where(beyond, float("nan"), out)
    lse = tl.where(beyond, float("nan"), lse)
    offset = row * VALUE_DIM + value_dim
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=value_dim < VALUE_DIM)
    tl.store(lse_ptr + row, lse)
