"""Triton kernels for a step over pages: score, select, attend and merge, as for `MobaCache`.

`_score_kernel` divides the blocks of a sequence into ``SPLITS`` splits of ``SPLIT`` blocks, and
keeps the best blocks of each split, among which the kernel of `MobaCache` selects. Each program of
`_attend_kernel` attends to ``CHUNK`` keys of a selected block, which makes one partial output.
Under full attention, `_attend_to_all_kernel` divides the blocks of a sequence evenly among
``PARTS`` partial outputs.

Query head ``h`` of token ``t`` is row ``t * Hq + h``. Strides are constants, since a server
allocates its pages once, and the compiler then knows the alignment of every row of features.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.cache import CachedCall
from flexmoba.cache.kernels import MAX_TOPK as MAX_TOPK
from flexmoba.cache.kernels import (
    attend_to_keys,
    keys_of_block,
    merge_kernel,
    score_constants,
)
from flexmoba.cache.select_kernel import select_best_on_cuda
from flexmoba.gate import gate_rows
from flexmoba.gate.kernel import NOTHING, merge_best, scores_of, sort_keys, without_copies
from flexmoba.paged.batch import PagedBatch
from flexmoba.paged.pages import Pages
from flexmoba.runtime.triton_launch import kernel, launch, packed

_KEYS, _CHUNK = 64, 256  # as for `MobaCache`
_PARTS_OF_ALL = 32  # of full attention; for one sequence and 8 KV heads, 256 programs


def attend_steps_on_cuda(
    q: Tensor, pages: Pages, batch: PagedBatch, call: CachedCall
) -> tuple[Tensor, Tensor]:
    """Computes `attend_steps` by Triton kernels."""
    pages, q = aligned(pages), by_token(q)
    tokens, heads, _ = q.shape
    kv_heads, value_dim, n_blocks = pages.k.shape[1], pages.v.shape[3], batch.block_table.shape[1]
    table, rows, positions = (packed(x) for x in batch[:3])
    group = heads // kv_heads
    chunks = triton.cdiv(pages.block_size, _CHUNK)
    parts = _PARTS_OF_ALL if call.topk == 0 else call.topk * chunks
    constants = {
        "HEADS": kv_heads,
        "GROUP": group,
        "GROUP_ROWS": max(16, triton.next_power_of_2(group)),
        "Q_LEN": 1,  # of `merge_kernel`: a row of its batch is a token
        "NEW_Q": q.stride(0),
        "BLOCK_SIZE": pages.block_size,
        "CHUNK": _CHUNK,
        "CHUNKS": chunks,
        "PARTS": parts,
        "ALL_PARTS": triton.next_power_of_2(parts),
        "SOME_PARTS": min(32, triton.next_power_of_2(parts)),
        "KEYS": _KEYS,
        "num_warps": 4,
    }
    constants |= constants_of(pages)
    n_rows = tokens * heads
    partial_out = torch.empty(n_rows, parts, value_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(n_rows, parts, dtype=torch.float32, device=q.device)
    out = q.new_empty(tokens, heads, value_dim)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    factor, partials = call.scale / math.log(2), (partial_out, partial_lse)
    where = (table, rows, positions)
    with torch.cuda.device_of(q):
        if call.topk == 0:
            inputs: tuple[Any, ...] = (q, pages.k, pages.v, *where, *partials, n_blocks, factor)
            launch(_attend_to_all_kernel, tokens * kv_heads * parts, inputs, constants, (q.dtype,))
        else:
            selected = _select(q, pages, where, call)
            constants["GATE_GROUP"] = selected.shape[1] // kv_heads
            inputs = (q, pages.k, pages.v, *where, selected, *partials, n_blocks, factor)
            launch(_attend_kernel, n_rows * parts, inputs, constants, (q.dtype,))
        merged = (*partials, positions, out, lse, kv_heads, n_blocks)
        launch(merge_kernel, n_rows, merged, constants, (q.dtype,))
    return out, lse


def _select(
    q: Tensor, pages: Pages, where: tuple[Tensor, Tensor, Tensor], call: CachedCall
) -> Tensor:
    """Selects the blocks of each row of the gate, ``(T, Hq or Hkv, 1, topk)``."""
    kv_heads, n_blocks = pages.means.shape[1], where[0].shape[1]
    rows = q if call.gate.per == "token" else gate_rows(q[:, :, None], kv_heads, call.gate)[:, :, 0]
    rows = by_token(rows)
    tokens, heads, _ = rows.shape
    gate_group = heads // kv_heads
    constants = score_constants(rows, pages.means, n_blocks, gate_group, call) | {
        "HEADS": kv_heads,
        "GATE_GROUP": gate_group,
        "NEW_Q": rows.stride(0),
    }
    constants |= constants_of(pages)
    shape = tokens, heads, 1, constants["SPLITS"], constants["SLOTS"]
    best = torch.empty(shape, dtype=torch.int64, device=q.device)
    if call.scored > 0:
        tiles = triton.cdiv(gate_group, constants["TILE_Q"])
        n_programs = tokens * kv_heads * tiles * constants["SPLITS"]
        arguments = (rows, pages.means, *where, best, n_blocks)
        launch(_score_kernel, n_programs, arguments, constants, (rows.dtype, pages.means.dtype))
    return select_best_on_cuda(best, where[2], n_blocks, call)


def by_token(x: Tensor) -> Tensor:
    """Returns ``x (T, heads, D)`` or a copy with adjacent heads, from a multiple of 16 bytes on."""
    is_dense = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.data_ptr() % 16 == 0
    if x.shape[0] < 2 or not is_dense:  # the stride of a single token may be any number
        return packed(x)
    return x


def aligned(pages: Pages) -> Pages:
    """Returns the pages, if kernels can read them in place."""
    for name, x in zip(pages._fields, pages, strict=True):
        if x.data_ptr() % 16 != 0:
            raise ValueError(
                f"{name} of pages must begin at a multiple of 16 bytes on CUDA, got the address "
                f"{x.data_ptr()}; use a head dim and a page size that are multiples of 8"
            )
    return pages


def constants_of(pages: Pages) -> dict[str, int]:
    """Returns the strides and sizes of pages, as constants of kernels."""
    k, v, means = pages.k, pages.v, pages.means_of_sub_blocks
    return {
        "K_PAGE": k.stride(0),
        "K_HEAD": k.stride(1),
        "K_TOKEN": k.stride(2),
        "V_PAGE": v.stride(0),
        "V_HEAD": v.stride(1),
        "V_TOKEN": v.stride(2),
        "MEAN_PAGE": means.stride(0),
        "MEAN_HEAD": means.stride(1),
        "MEAN_SUB_BLOCK": means.stride(2),
        "DIM": k.shape[3],
        "TILE_D": max(16, triton.next_power_of_2(k.shape[3])),
        "VALUE_DIM": v.shape[3],
        "TILE_VALUE_D": max(16, triton.next_power_of_2(v.shape[3])),
    }


@kernel
def _score_kernel(
    q_ptr, means_ptr, table_ptr, rows_ptr, positions_ptr, best_ptr, n_blocks: tl.int32,
    HEADS: tl.constexpr, GATE_GROUP: tl.constexpr, NEW_Q: tl.constexpr, BY_PARTS: tl.constexpr,
    SINKS: tl.constexpr, LOCALS: tl.constexpr, SUB_BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, TILE_Q: tl.constexpr, ROWS: tl.constexpr,
    TILE_N: tl.constexpr, STAGES: tl.constexpr, BLOCK_SIZE: tl.constexpr, MEAN_PAGE: tl.constexpr,
    MEAN_HEAD: tl.constexpr, MEAN_SUB_BLOCK: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Keeps the best blocks of one split for the queries of one KV head of one token."""
    tiles: tl.constexpr = (GATE_GROUP + TILE_Q - 1) // TILE_Q
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % tiles
    head = tl.program_id(0) // (SPLITS * tiles) % HEADS
    token = (tl.program_id(0) // (SPLITS * tiles * HEADS)).to(tl.int64)
    position = tl.load(positions_ptr + token)
    table_ptr += tl.load(rows_ptr + token).to(tl.int64) * n_blocks
    query = tile * TILE_Q + tl.arange(0, ROWS)
    copy = tl.minimum(tile * TILE_Q + tl.arange(0, TILE_Q) % ROWS, GATE_GROUP - 1)
    is_query = query < GATE_GROUP
    candidates_end = tl.minimum(tl.maximum(position, 0) // BLOCK_SIZE, n_blocks) - LOCALS
    dim = tl.arange(0, TILE_D)
    in_dim = (dim < DIM)[None, :]
    q_ptr += token * NEW_Q + head * (GATE_GROUP * DIM)
    q = tl.load(q_ptr + copy[:, None] * DIM + dim[None, :], mask=in_dim, other=0.0)
    means_ptr += head * MEAN_HEAD + dim[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full([ROWS, SLOTS], NOTHING, tl.int64)
    lowest = tl.full([TILE_Q, TILE_N], float("-inf"), tl.float32)
    score = lowest
    end = tl.minimum(candidates_end, (split + 1) * SPLIT)
    n_tiles = tl.cdiv(tl.maximum(end - split * SPLIT, 0), TILE_N)
    # Loads of the block table take two stages more.
    for i in tl.range(0, n_tiles * SUB_BLOCKS, num_stages=STAGES + 2):
        block, sub_block = split * SPLIT + i // SUB_BLOCKS * TILE_N, i % SUB_BLOCKS
        block += tl.arange(0, TILE_N)
        is_candidate = block < candidates_end
        page = tl.load(table_ptr + block, mask=is_candidate, other=0).to(tl.int64)
        mean_ptr = means_ptr + page[:, None] * MEAN_PAGE + sub_block * MEAN_SUB_BLOCK
        mask = is_candidate[:, None] & in_dim
        new = scores_of(q, tl.load(mean_ptr, mask=mask, other=0.0), BY_PARTS)
        score = tl.maximum(score, new, tl.PropagateNan.ALL)
        if sub_block == SUB_BLOCKS - 1:
            keys = sort_keys(without_copies(score, ROWS), block)
            is_scored = (block >= SINKS) & is_candidate
            best = merge_best(best, tl.where(is_scored[None, :], keys, NOTHING))
            score = lowest
    row = (token * HEADS + head) * GATE_GROUP + query
    offset = (row * SPLITS + split) * SLOTS
    tl.store(best_ptr + offset[:, None] + slot, best, mask=is_query[:, None])


@kernel
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, positions_ptr, selected_ptr, partial_out_ptr,
    partial_lse_ptr, n_blocks: tl.int32, factor: tl.float32,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GATE_GROUP: tl.constexpr, NEW_Q: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    KEYS: tl.constexpr, K_PAGE: tl.constexpr, K_HEAD: tl.constexpr, K_TOKEN: tl.constexpr,
    V_PAGE: tl.constexpr, V_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, DIM: tl.constexpr,
    TILE_D: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Attends from one query to at most ``CHUNK`` keys of one of its selected blocks."""
    partial = tl.program_id(0).to(tl.int64)
    row = partial // PARTS
    chunk, column = tl.program_id(0) % CHUNKS, tl.program_id(0) % PARTS // CHUNKS
    token, head = row // (HEADS * GROUP), row % (HEADS * GROUP)
    gate_row = row // (GROUP // GATE_GROUP)
    block = tl.load(selected_ptr + gate_row * (PARTS // CHUNKS) + column)
    first = chunk * CHUNK
    n_keys = keys_of_block(column, tl.load(positions_ptr + token), BLOCK_SIZE)
    end = tl.minimum(first + CHUNK, n_keys)
    if (block < 0) | (first >= end):
        tl.store(partial_lse_ptr + partial, float("-inf"))
        return
    sequence = tl.load(rows_ptr + token).to(tl.int64)
    page = tl.load(table_ptr + sequence * n_blocks + block).to(tl.int64)
    dim, value_dim = tl.arange(0, TILE_D), tl.arange(0, TILE_VALUE_D)
    q = tl.load(q_ptr + token * NEW_Q + head * DIM + dim, mask=dim < DIM, other=0.0)
    kv_head = head // GROUP
    out, lse = attend_to_keys(
        q.to(tl.float32),
        k_ptr + page * K_PAGE + kv_head * K_HEAD + first * K_TOKEN,
        v_ptr + page * V_PAGE + kv_head * V_HEAD + first * V_TOKEN,
        end - first, factor, K_TOKEN, V_TOKEN, KEYS, DIM, TILE_D, VALUE_DIM, TILE_VALUE_D,
    )  # fmt: skip
    tl.store(partial_lse_ptr + partial, lse)
    offset = partial * VALUE_DIM + value_dim
    tl.store(partial_out_ptr + offset, out, mask=value_dim < VALUE_DIM)


@kernel
def _attend_to_all_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, positions_ptr, partial_out_ptr, partial_lse_ptr,
    n_blocks: tl.int32, factor: tl.float32,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, NEW_Q: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    K_PAGE: tl.constexpr, K_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, V_PAGE: tl.constexpr,
    V_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, DIM: tl.constexpr, TILE_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_VALUE_D: tl.constexpr,
):  # fmt: skip
    """Attends from the queries of one KV head of a token to a share of all keys before it."""
    part = tl.program_id(0) % PARTS
    kv_head = tl.program_id(0) // PARTS % HEADS
    token = (tl.program_id(0) // (PARTS * HEADS)).to(tl.int64)
    keys_end = tl.minimum(tl.load(positions_ptr + token) + 1, n_blocks * BLOCK_SIZE)
    # Shares are multiples of KEYS, so that no tile of keys belongs to two of them.
    share = tl.cdiv(tl.cdiv(keys_end, KEYS), PARTS) * KEYS
    first, end = part * share, tl.minimum((part + 1) * share, keys_end)
    query = tl.arange(0, GROUP_ROWS)
    is_query = query < GROUP
    dim, value_dim = tl.arange(0, TILE_D), tl.arange(0, TILE_VALUE_D)
    row = (token * HEADS + kv_head) * GROUP + query
    partial = row * PARTS + part
    if first >= end:
        tl.store(partial_lse_ptr + partial, tl.full([GROUP_ROWS], float("-inf"), tl.float32),
                 mask=is_query)  # fmt: skip
        return
    table_ptr += tl.load(rows_ptr + token).to(tl.int64) * n_blocks
    q = tl.load(
        q_ptr + token * NEW_Q + (kv_head * GROUP + query)[:, None] * DIM + dim[None, :],
        mask=is_query[:, None] & (dim < DIM)[None, :], other=0.0,
    )  # fmt: skip
    k_ptr += kv_head * K_HEAD
    v_ptr += kv_head * V_HEAD
    highest = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    out = tl.zeros([GROUP_ROWS, TILE_VALUE_D], tl.float32)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        page = tl.load(table_ptr + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        offset = key % BLOCK_SIZE
        k = tl.load(
            k_ptr + (page * K_PAGE + offset * K_TOKEN)[:, None] + dim[None, :],
            mask=is_key[:, None] & (dim < DIM)[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + (page * V_PAGE + offset * V_TOKEN)[:, None] + value_dim[None, :],
            mask=is_key[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        out = out * decay[:, None] + weighted
        highest = new_highest
    tl.store(partial_lse_ptr + partial, highest + tl.log2(total), mask=is_query)
    tl.store(
        partial_out_ptr + partial[:, None] * VALUE_DIM + value_dim[None, :],
        out / total[:, None],
        mask=is_query[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
