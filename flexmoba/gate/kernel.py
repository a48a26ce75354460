"""The gate on CUDA: one Triton kernel that scores a tile of queries and keeps their best blocks.

Scores are not written to memory, and the kernel skips blocks after the queries. It maps each score
to an integer of the same order, and keeps the highest integer of the sub-blocks of each block. It
packs this integer and the block index into a 64-bit integer, the sort key, which it compares
instead of the score: the higher score wins, and of equal scores the later block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.gate.options import Candidates, GateOptions, GateSizes
from flexmoba.runtime.triton_launch import kernel, launch, packed

MAX_COUNT = 64  # blocks of a row, which the kernel keeps in registers
MAX_HEAD_DIM = 256

NOTHING = tl.constexpr(-(2**63))  # below the sort key of any score
_EVERYTHING = tl.constexpr(2**63 - 1)


def select_on_cuda(
    q: Tensor, means: Tensor, sizes: GateSizes, gate: GateOptions, candidates: Candidates
) -> Tensor:
    """Returns the candidates with the highest scores, ``(B, Hq or Hkv, rows, scored)`` int32.

    The arguments are as in `select_by_means`, which calls this function.
    """
    first_block, end_block, _ = candidates
    count = sizes.scored(gate)
    batch, heads, q_len, dim = q.shape
    kv_heads, n_blocks = means.shape[1], means.shape[2] // gate.sub_blocks
    by_parts = q.dtype == torch.float32 and means.dtype != torch.float32
    q, means = packed(q), packed(means)
    first = q if first_block is None else packed(first_block)
    last = q if end_block is None else packed(end_block)
    selected = torch.empty(batch, heads, q_len, count, dtype=torch.int32, device=q.device)
    tile_q, tile_n = 64, 32
    numbers = (
        *(batch * heads, heads, heads // kv_heads, q_len, n_blocks),
        *(sizes.offset, sizes.block_size),
    )
    constants = {
        "DIM": dim,
        "COUNT": count,
        "HAS_FIRST": first_block is not None,
        "HAS_END": end_block is not None,
        "SINKS": gate.sink_blocks,
        "LOCALS": gate.local_blocks,
        "SUB_BLOCKS": gate.sub_blocks,
        "STRIDE": gate.stride,
        "IS_CAUSAL": sizes.is_causal,
        "BY_PARTS": by_parts,
        "TILE_Q": tile_q,
        "TILE_N": tile_n,
        "TILE_D": max(16, triton.next_power_of_2(dim)),
        "SLOTS": triton.next_power_of_2(count),
        "num_warps": 2 if dim <= 128 and q.element_size() == 2 else 4,
    }
    dtypes = (q.dtype, means.dtype)
    with torch.cuda.device_of(q):
        n_programs = triton.cdiv(q_len, tile_q) * batch * heads
        tensors = q, means, first, last, selected
        launch(_select_kernel, n_programs, (*tensors, *numbers), constants, dtypes)
    return selected


@triton.jit
def nothing_yet(ROWS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """Returns the slots of each row and their initial sort keys.

    The first ``COUNT`` slots are empty, with different keys. The others are never replaced, because
    their keys are higher than all others.
    """
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros([ROWS, SLOTS], tl.int32)
    return slot, tl.where(slot < COUNT, NOTHING + slot.to(tl.int64), _EVERYTHING)


@triton.jit
def score_keys(
    q,
    means_ptr,
    block,
    n_blocks,
    first,
    end,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    SUB_BLOCKS: tl.constexpr,
    BY_PARTS: tl.constexpr,
):
    """Returns the sort keys ``(rows, blocks)`` of a tile of blocks.

    Candidates are the blocks from ``first`` to before ``end``; others get ``NOTHING``.
    """
    dim = tl.arange(0, TILE_D)
    mask = (block < n_blocks)[:, None] & (dim < DIM)[None, :]
    mean_ptr = means_ptr + block[:, None] * (SUB_BLOCKS * DIM) + dim[None, :]
    bits = _ordered_scores(q, tl.load(mean_ptr, mask=mask, other=0.0), BY_PARTS)
    for sub_block in range(1, SUB_BLOCKS):
        mean = tl.load(mean_ptr + sub_block * DIM, mask=mask, other=0.0)
        bits = tl.maximum(bits, _ordered_scores(q, mean, BY_PARTS))
    key = (bits.to(tl.int64) << 32) | block.to(tl.int64)[None, :]
    candidate = (block[None, :] >= first[:, None]) & (block[None, :] < end[:, None])
    return tl.where(candidate, key, NOTHING)


@triton.jit
def _ordered_scores(q, mean, BY_PARTS: tl.constexpr):
    """Returns the scores of mean keys as int32 in the order of the scores; NaN is the highest.

    ``BY_PARTS`` is for float32 queries and mean keys rounded to half precision: three products on
    the matrix units then lose at most the last two bits of a float32 product.
    """
    mean = mean.to(q.dtype)
    if BY_PARTS:
        score = tl.dot(q, tl.trans(mean), input_precision="tf32x3")
    else:
        score = tl.dot(q, tl.trans(mean), input_precision="ieee")
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, bits)


@triton.jit
def keep_best(best, key):
    """Replaces the worst sort keys in ``best`` by the best of a tile, until no row improves."""
    highest = tl.max(key, 1)
    worst = tl.min(best, 1)
    while tl.max((highest > worst).to(tl.int32), 0) > 0:
        gains = (highest > worst)[:, None] & (best == worst[:, None])
        best = tl.where(gains, highest[:, None], best)
        key = tl.where(key == highest[:, None], NOTHING, key)
        highest = tl.max(key, 1)
        worst = tl.min(best, 1)
    return best


@kernel
def _select_kernel(
    q_ptr,
    means_ptr,
    first_ptr,
    end_ptr,
    selected_ptr,
    all_heads: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    q_len: tl.int32,
    n_blocks: tl.int32,
    offset: tl.int32,
    block_size: tl.int32,
    DIM: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_END: tl.constexpr,
    SINKS: tl.constexpr,
    LOCALS: tl.constexpr,
    SUB_BLOCKS: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BY_PARTS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    # The last queries have the most candidates, so they start first.
    head = tl.program_id(0) % all_heads
    tile = tl.cdiv(q_len, TILE_Q) - 1 - tl.program_id(0) // all_heads
    row = tile * TILE_Q + tl.arange(0, TILE_Q)
    valid = row < q_len
    dim = tl.arange(0, TILE_D)
    q_row = head.to(tl.int64) * q_len + row
    q = tl.load(
        q_ptr + q_row[:, None] * DIM + dim, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0
    )
    if HAS_END:
        end = tl.load(end_ptr + head // heads * q_len + row, mask=valid, other=0) - LOCALS
    elif not IS_CAUSAL:
        end = tl.full([TILE_Q], 0, tl.int32) + n_blocks
    else:
        end = (tl.minimum(row, q_len - 1) * STRIDE + offset) // block_size - LOCALS
    first = tl.full([TILE_Q], SINKS, tl.int32)
    if HAS_FIRST:
        first += tl.load(first_ptr + head // heads * q_len + row, mask=valid, other=n_blocks)

    slot, best = nothing_yet(TILE_Q, COUNT, SLOTS)
    means_ptr += (head // group).to(tl.int64) * (n_blocks * SUB_BLOCKS) * DIM
    for start in range(tl.min(first, 0) // TILE_N * TILE_N, tl.max(end, 0), TILE_N):
        block = start + tl.arange(0, TILE_N)
        keys = score_keys(
            q, means_ptr, block, n_blocks, first, end, DIM, TILE_D, SUB_BLOCKS, BY_PARTS
        )
        best = keep_best(best, keys)

    best = tl.sort(best, descending=True)  # unused slots come first
    selected = tl.where(best < NOTHING + SLOTS, -1, (best & 0xFFFFFFFF).to(tl.int32))
    column = slot - (SLOTS - COUNT)
    tl.store(
        selected_ptr + q_row[:, None] * COUNT + column,
        selected,
        mask=valid[:, None] & (column >= 0),
    )
