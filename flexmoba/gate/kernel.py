"""The gate on CUDA: one Triton kernel that scores a tile of queries and keeps their best blocks.

Scores are not written to memory, and the kernel skips blocks after the queries. The score of a
block is the highest score of its sub-blocks. The kernel maps it to an integer of the same order,
and packs this integer and the block index into a 64-bit integer, the sort key, which it compares
instead of the score: the higher score wins, and of equal scores the later block.

A matrix product leaves a quarter of the columns of a row in each of four threads. Each thread keeps
a sorted list of the best keys of its columns (`lists`), and the four lists are merged after the
last tile. On devices that compare doubles fast, the keys of lists are doubles.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.gate.lists import best_of_lists, keep_best_in_lists
from flexmoba.gate.options import Candidates, GateOptions, GateSizes
from flexmoba.runtime import has_large_shared_memory
from flexmoba.runtime.triton_launch import kernel, launch, on_device_of, packed

MAX_COUNT = tl.constexpr(64)  # blocks of a row, which the kernel keeps in registers
MAX_HEAD_DIM = 256
_LISTS = 4  # of a row, one in each of the threads that hold the row of a matrix product
_MAX_LIST = 32  # keys of a list that fits in registers
_DOUBLES = True  # whether lists may hold doubles

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
    tile_q, slots = rows_of_a_tile(q), next_power_of_2(count)
    is_half = q.element_size() == 2
    # Sums of groups are float32, and take more registers for their products by parts.
    use_lists = slots <= (_MAX_LIST if is_half else _MAX_LIST // 4 if by_parts else 0)
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
        "USE_LISTS": use_lists,
        "DOUBLES": use_lists and _DOUBLES and _has_fast_doubles(q.device),
        "LISTS": _LISTS,
        "TILE_Q": tile_q,
        # The longest lists leave registers for half as many new keys.
        "TILE_N": max(32, _LISTS * min(slots, _MAX_LIST // 2)) if use_lists else 32,
        "TILE_D": max(16, next_power_of_2(dim)),
        "SLOTS": slots,
        "num_warps": 2 if dim <= 128 and is_half and not use_lists else 4,
        # Copies of mean keys to shared memory, which float32 fills with one.
        "num_stages": (3 if dim <= 128 else 2) if is_half else 1,
    }
    dtypes = (q.dtype, means.dtype)
    with on_device_of(q):
        n_programs = ceil_div(q_len, tile_q) * batch * heads
        tensors = q, means, first, last, selected
        launch(_select_kernel, n_programs, (*tensors, *numbers), constants, dtypes)
    return selected


def rows_of_a_tile(rows: Tensor) -> int:
    """Returns how many rows ``(..., D)`` of the gate a program scores at most.

    64, or 32 where 64 rows and the mean keys may not fit in 99 KiB of shared memory.
    """
    is_wide = rows.element_size() == 4 and rows.shape[-1] > 128
    return 32 if is_wide and not has_large_shared_memory(rows.device) else 64


@functools.cache
def _has_fast_doubles(device: torch.device) -> bool:
    """Returns whether the device compares doubles at a useful rate, as an A100 and an H100 do."""
    if device.type != "cuda":  # Triton's interpreter
        return True
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


@triton.jit
def nothing_yet(ROWS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """Returns the slots of each row and their initial sort keys.

    The first ``COUNT`` slots are empty, with different keys. The others are never replaced, because
    their keys are higher than all others.
    """
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros([ROWS, SLOTS], tl.int32)
    return slot, tl.where(slot < COUNT, NOTHING + slot.to(tl.int64), _EVERYTHING)


@triton.jit
def block_scores(
    q,
    means_ptr,
    block,
    n_blocks,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    SUB_BLOCKS: tl.constexpr,
    BY_PARTS: tl.constexpr,
):
    """Returns the scores ``(rows, blocks)`` of a tile of blocks, NaN if a sub-block has NaN."""
    dim = tl.arange(0, TILE_D)
    mask = (block < n_blocks)[:, None] & (dim < DIM)[None, :]
    mean_ptr = means_ptr + block[:, None] * (SUB_BLOCKS * DIM) + dim[None, :]
    score = scores_of(q, tl.load(mean_ptr, mask=mask, other=0.0), BY_PARTS)
    for sub_block in range(1, SUB_BLOCKS):
        mean = tl.load(mean_ptr + sub_block * DIM, mask=mask, other=0.0)
        score = tl.maximum(score, scores_of(q, mean, BY_PARTS), tl.PropagateNan.ALL)
    return score


@triton.jit
def scores_of(q, mean, BY_PARTS: tl.constexpr):
    """Returns the scores ``(rows, means)`` of mean keys.

    ``BY_PARTS`` is for float32 queries and mean keys rounded to half precision: three products on
    the matrix units then lose at most the last two bits of a float32 product.
    """
    mean = mean.to(q.dtype)
    if BY_PARTS:
        score = tl.dot(q, tl.trans(mean), input_precision="tf32x3")
    else:
        score = tl.dot(q, tl.trans(mean), input_precision="ieee")
    return score + 0.0  # -0.0 equals 0.0


@triton.jit
def sort_keys(score, block):
    """Returns the sort keys of the scores ``(rows, blocks)`` of blocks, as integers."""
    bits = score.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the scores
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | block.to(tl.int64)[None, :]


@triton.jit
def double_keys(score, block):
    """Returns the sort keys of the scores ``(rows, blocks)`` of blocks, as doubles.

    The bits of the score are the upper half of a double, and the block is the lower half, inverted
    if the score is negative. Doubles compare in the same order as the integers of `sort_keys`, on
    units that are idle otherwise. The exponent of a double has three bits more than that of a
    score, so even an infinite score gives a finite double.
    """
    bits = tl.where(score != score, 0x7F800001, score.to(tl.int32, bitcast=True))  # above inf
    low = (block[None, :] ^ (bits >> 31)).to(tl.int64) & 0xFFFFFFFF
    return ((bits.to(tl.int64) << 32) | low).to(tl.float64, bitcast=True)


@triton.jit
def blocks_of_keys(key):
    """Returns the blocks of sort keys, -1 for none."""
    if key.dtype == tl.float64:
        bits = key.to(tl.int64, bitcast=True)
        block = tl.where(
            key == float("-inf"), -1, ((bits ^ (bits >> 63)) & 0xFFFFFFFF).to(tl.int32)
        )
    else:
        block = tl.where(key < NOTHING + MAX_COUNT, -1, (key & 0xFFFFFFFF).to(tl.int32))
    return block


@triton.jit
def only_candidates(key, block, first, end):
    """Replaces the sort keys of blocks before ``first`` or from ``end`` on by the lowest key."""
    candidate = (block[None, :] >= first[:, None]) & (block[None, :] < end[:, None])
    if key.dtype == tl.float64:
        key = tl.where(candidate, key, float("-inf"))
    else:
        key = tl.where(candidate, key, NOTHING)
    return key


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


@triton.jit
def without_copies(score, ROWS: tl.constexpr):
    """Returns the first ``ROWS`` rows of ``score``, of which the other rows are copies.

    A matrix product has at least 16 rows, but a decoding step may have fewer. Each copy of a row
    gives another share of its columns, so that all threads that hold copies sort some of them.
    """
    COPIES: tl.constexpr = score.shape[0] // ROWS
    SHARE: tl.constexpr = score.shape[1] // COPIES
    if COPIES > 1:
        index = tl.arange(0, COPIES)
        is_share = index[:, None, None, None] == index[None, None, :, None]
        bits = tl.reshape(score.to(tl.int32, bitcast=True), [COPIES, ROWS, COPIES, SHARE])
        bits = tl.xor_sum(tl.where(is_share, bits, 0), 2)
        bits = tl.reshape(tl.permute(bits, [1, 0, 2]), [ROWS, COPIES * SHARE])
        score = bits.to(tl.float32, bitcast=True)
    return score


@triton.jit
def merge_best(best, key):
    """Returns the best of the sort keys ``best (rows, slots)`` and ``key``, the lowest first.

    ``best`` is sorted in this order. Unlike that of `keep_best`, the cost does not depend on keys.
    """
    if 2 * key.shape[1] == best.shape[1]:
        key = tl.reshape(tl.join(key, tl.full(key.shape, NOTHING, tl.int64)), best.shape)
    return tl.bitonic_merge(tl.maximum(best, tl.topk(key, best.shape[1])))


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
    USE_LISTS: tl.constexpr,
    DOUBLES: tl.constexpr,
    LISTS: tl.constexpr,
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

    if USE_LISTS:
        if DOUBLES:
            best = tl.full([TILE_Q, LISTS, SLOTS], float("-inf"), tl.float64)
        else:
            best = tl.full([TILE_Q, LISTS, SLOTS], NOTHING, tl.int64)
    else:
        slot, best = nothing_yet(TILE_Q, COUNT, SLOTS)
    means_ptr += (head // group).to(tl.int64) * (n_blocks * SUB_BLOCKS) * DIM
    # All blocks of a tile in this range are candidates of all rows.
    full_start, full_end = tl.max(first, 0), tl.min(tl.where(valid, end, n_blocks), 0)
    for start in range(tl.min(first, 0) // TILE_N * TILE_N, tl.max(end, 0), TILE_N):
        block = start + tl.arange(0, TILE_N)
        score = block_scores(q, means_ptr, block, n_blocks, DIM, TILE_D, SUB_BLOCKS, BY_PARTS)
        if DOUBLES:
            key = double_keys(score, block)
        else:
            key = sort_keys(score, block)
        if (start < full_start) | (start + TILE_N > full_end):
            key = only_candidates(key, block, first, end)
        if USE_LISTS:
            best = keep_best_in_lists(best, key, TILE_Q, TILE_N, LISTS, SLOTS)
        else:
            best = keep_best(best, key)

    if USE_LISTS:
        best = best_of_lists(best, TILE_Q, LISTS, SLOTS)
        column = tl.arange(0, SLOTS)[None, :] + tl.zeros([TILE_Q, SLOTS], tl.int32)
    else:
        best = tl.sort(best, descending=True)  # unused slots come first
        column = slot - (SLOTS - COUNT)
    tl.store(
        selected_ptr + q_row[:, None] * COUNT + column,
        blocks_of_keys(best),
        mask=valid[:, None] & (column >= 0) & (column < COUNT),
    )
