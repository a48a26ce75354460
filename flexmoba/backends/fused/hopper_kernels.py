"""The attention of routed blocks on Hopper, in Gluon, with a role for each warp.

Each program processes one item of 128 rows after another. One warp copies the keys and values of
the item's block, two warps gather its queries, and two groups of four warps each attend from 64
rows. While a group adds the values of a tile of keys, it computes the weights of the next tile,
across the end of an item too, and the softmax of one group overlaps the products of the other.
Shared memory holds the queries of two items and a ring of tiles of keys and of values. A pair of
barriers for each buffer, ``full`` and ``free``, hands it from one role to the other; a role waits
for the phase of its n-th use.

`kernel_parts` defines the terms and sizes.
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flexmoba.runtime.triton_launch import kernel

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def allocate_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """Returns ``N`` barriers, each for ``COUNT`` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def rows_of_item(item, table, n_blocks, ROWS: gl.constexpr):
    """Returns the block of an item, counted over all KV heads, and the range of its rows."""
    first_row_ptr, first_item_ptr, block_of_item_ptr = table
    block = gl.load(block_of_item_ptr + item)
    bin = block + block // n_blocks
    begin = gl.load(first_row_ptr + bin) + (item - gl.load(first_item_ptr + block)) * ROWS
    return block, begin, gl.minimum(begin + ROWS, gl.load(first_row_ptr + bin + 1))


@gluon.jit
def place_of_block(block, places, n_blocks, first_kv_head, kv_heads, BLOCK_SIZE: gl.constexpr):
    """Returns the row and the column of the first key and value of a block in their matrices."""
    k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h = places
    kv_head = first_kv_head + block // n_blocks
    batch = kv_head // kv_heads
    head = kv_head - batch * kv_heads
    key = block % n_blocks * BLOCK_SIZE
    return (
        batch * k_row_b + head * k_row_h + key, head * k_column_h,
        batch * v_row_b + head * v_row_h + key, head * v_column_h,
    )  # fmt: skip


@gluon.jit
def copy_rows(
    ptr, buffer, query, head_in_group, q_len, stride_h, STRIDE: gl.constexpr, WARPS: gl.constexpr
):
    """Starts copies of queries of a KV head, each by the threads that hold a part of its row.

    A thread finds the offset of one row, in units of 16 bytes, and hands it to the others.
    """
    DIM: gl.constexpr = buffer.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    offset = query * (STRIDE // 8) + head_in_group * (stride_h - q_len * (STRIDE // 8))
    offset = gl.convert_layout(offset, gl.SliceLayout(1, LAYOUT)).to(gl.int64) * 8
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    async_copy.async_copy_global_to_shared(buffer, ptr + offset[:, None] + dim[None, :])


@gluon.jit
def copy_keys(
    k_desc, v_desc, k_buffer, v_buffer, k_full, k_free, v_full, v_free, block_of_item_ptr, places,
    first_item, last_item, n_blocks, first_kv_head, kv_heads,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the keys and values of each item's block to shared memory."""
    n = 0
    for item in range(first_item + gl.program_id(0), last_item, gl.num_programs(0)):
        k_row, k_column, v_row, v_column = place_of_block(
            gl.load(block_of_item_ptr + item), places, n_blocks, first_kv_head, kv_heads, BLOCK_SIZE
        )
        for start in range(0, BLOCK_SIZE, KEYS):
            stage = n % STAGES
            phase = n // STAGES & 1 ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), KEYS * DIM * 2)
            tma.async_copy_global_to_shared(
                k_desc, [k_row + start, k_column], k_full.index(stage), k_buffer.index(stage)
            )
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_full.index(stage), KEYS * DIM * 2)
            tma.async_copy_global_to_shared(
                v_desc, [v_row + start, v_column], v_full.index(stage), v_buffer.index(stage)
            )
            n += 1


@gluon.jit
def gather_queries(
    q_ptr, pair_ptr, q_buffer, pairs_buffer, q_full, q_free, table, first_item, last_item, n_blocks,
    first_query, first_kv_head, piece_pair, kv_heads, q_len, q_stride_b, q_stride_h,
    GROUP: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, Q_STRIDE: gl.constexpr,
):  # fmt: skip
    """Copies the queries of each item to shared memory; rows beyond its end repeat the last one.

    ``pairs_buffer`` receives their pairs, counted from the first pair of the piece, and -1 beyond
    the end.
    """
    n = 0
    row = gl.arange(0, ROWS // 2, layout=gl.BlockedLayout([1], [32], [2], [0]))
    for item in range(first_item + gl.program_id(0), last_item, gl.num_programs(0)):
        block, begin, end = rows_of_item(item, table, n_blocks, ROWS)
        kv_head = first_kv_head + block // n_blocks
        batch = kv_head // kv_heads
        head = (kv_head - batch * kv_heads) * GROUP
        q_head = q_ptr + (batch * q_stride_b + head * q_stride_h) * 8
        stage = n & 1
        mbarrier.wait(q_free.index(stage), n // 2 & 1 ^ 1)
        for half in gl.static_range(2):
            index = begin + half * (ROWS // 2) + row
            pair = gl.load(pair_ptr + gl.minimum(index, end - 1))
            query = first_query - kv_head * GROUP * q_len + pair // COUNT
            copy_rows(
                q_head, q_buffer.index(stage * 2 + half), query, query // q_len, q_len, q_stride_h,
                Q_STRIDE, 2,
            )  # fmt: skip
            pair = gl.where(index < end, pair - piece_pair, -1)
            pairs_buffer.index(stage * 2 + half).store(pair)
        async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
        mbarrier.arrive(q_full.index(stage), count=1)
        n += 1


@gluon.jit
def add_scores(scores, highest, total, factor):
    """Adds scores to the state of the online softmax; returns the weights and the decay, too."""
    new_highest = gl.maximum(highest, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - new_highest[:, None])
    decay = gl.exp2(highest - new_highest)
    return weights, new_highest, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def store_partial(
    out, lse, buffer, pairs_buffer, partial_ptr, partial_lse_ptr,
    ROWS: gl.constexpr, STORED: gl.constexpr,
):  # fmt: skip
    """Writes partial outputs through shared memory, so that rows are written whole.

    ``ROWS`` is the layout of ``lse``, and ``STORED`` that in which ``out`` is written.
    """
    DIM: gl.constexpr = buffer.shape[1]
    pair = pairs_buffer.load(ROWS)
    gl.store(partial_lse_ptr + pair, lse, mask=pair >= 0)
    buffer.store(out.to(buffer.dtype))
    pair = pairs_buffer.load(gl.SliceLayout(1, STORED))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, STORED))
    offset = pair.to(gl.int64)[:, None] * DIM + dim[None, :]
    gl.store(partial_ptr + offset, buffer.load(STORED), mask=(pair >= 0)[:, None])


@gluon.jit
def attend_half(
    q_buffer, pairs_buffer, q_full, q_free, k_buffer, k_full, k_free, v_buffer, v_full, v_free,
    partial_ptr, partial_lse_ptr, first_item, last_item, factor,
    HALF: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Computes the partial outputs of one half of the rows of each item.

    An iteration adds the values of tile ``n`` to the output, and meanwhile computes the weights of
    the next tile, which may belong to the next item. The last one computes weights from an old
    buffer, which nothing uses.
    """
    M: gl.constexpr = ROWS // 2
    TILES: gl.constexpr = BLOCK_SIZE // KEYS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    steps = gl.num_programs(0)
    n_items = (last_item - first_item - gl.program_id(0) + steps - 1) // steps
    n_tiles = gl.maximum(n_items, 0) * TILES
    zeros = gl.full([M, KEYS], 0.0, gl.float32, SCORES)
    highest = gl.full([M], float("-inf"), gl.float32, SCORE_ROWS)
    total = gl.full([M], 0.0, gl.float32, SCORE_ROWS)
    out = gl.full([M, DIM], 0.0, gl.float32, OUT)
    mbarrier.wait(q_full.index(0), 0, pred=n_tiles > 0)
    fence_async_shared()  # the products read what other warps have copied
    mbarrier.wait(k_full.index(0), 0, pred=n_tiles > 0)
    k = k_buffer.index(0).permute((1, 0))
    scores = warpgroup_mma(q_buffer.index(HALF), k, zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0), count=1)
    weights, highest, total, _ = add_scores(scores, highest, total, factor)
    weights = gl.convert_layout(weights.to(v_buffer.dtype), WEIGHTS)
    for n in range(n_tiles):
        m = n + 1
        item = m // TILES
        is_last = m % TILES == 0
        if is_last:
            mbarrier.wait(q_full.index(item & 1), item // 2 & 1, pred=m < n_tiles)
            fence_async_shared()
        mbarrier.wait(k_full.index(m % STAGES), m // STAGES & 1, pred=m < n_tiles)
        q = q_buffer.index((item & 1) * 2 + HALF)
        k = k_buffer.index(m % STAGES).permute((1, 0))
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
        out = warpgroup_mma(weights, v_buffer.index(n % STAGES), out, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(m % STAGES), count=1)
        new_weights, new_highest, new_total, decay = add_scores(
            scores, gl.where(is_last, float("-inf"), highest), gl.where(is_last, 0.0, total), factor
        )
        new_weights = gl.convert_layout(new_weights.to(v_buffer.dtype), WEIGHTS)
        # The compiler would move the softmax behind this wait, if the new weights were not among
        # its dependencies.
        out, weights, new_weights = warpgroup_mma_wait(0, deps=[out, weights, new_weights])
        mbarrier.arrive(v_free.index(n % STAGES), count=1)
        if is_last:
            stage = item & 1 ^ 1
            store_partial(
                out * gl.convert_layout(1.0 / total, OUT_ROWS)[:, None], highest + gl.log2(total),
                q_buffer.index(stage * 2 + HALF), pairs_buffer.index(stage * 2 + HALF), partial_ptr,
                partial_lse_ptr, SCORE_ROWS, STORED,
            )  # fmt: skip
            mbarrier.arrive(q_free.index(stage), count=1)
            out = gl.full([M, DIM], 0.0, gl.float32, OUT)
        else:
            out = out * gl.convert_layout(decay, OUT_ROWS)[:, None]
        weights, highest, total = new_weights, new_highest, new_total


@functools.partial(kernel, jit=gluon.jit)
def hopper_attend_kernel(
    q_ptr, k_desc, v_desc, partial_ptr, partial_lse_ptr, pair_ptr, first_row_ptr, first_item_ptr,
    block_of_item_ptr,
    k_row_b: gl.int32, k_row_h: gl.int32, k_column_h: gl.int32,
    v_row_b: gl.int32, v_row_h: gl.int32, v_column_h: gl.int32,
    q_stride_b: gl.int64, q_stride_h: gl.int32,
    first_query: gl.int32, first_kv_head: gl.int32, first_block: gl.int32, last_block: gl.int32,
    piece_pair: gl.int32, kv_heads: gl.int32, q_len: gl.int32, n_blocks: gl.int32,
    factor: gl.float32,
    GROUP: gl.constexpr, COUNT: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, DIM: gl.constexpr, Q_STRIDE: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Computes the partial outputs of a piece, with their log-sum-exps in base 2.

    The products need about 200 registers of a thread, and the copies few: the program starts with
    168 for each of 12 warps, and the roles redistribute them.
    """
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_buffer = gl.allocate_shared_memory(DTYPE, [4, ROWS // 2, DIM], SHARED)
    k_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], SHARED)
    v_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], SHARED)
    pairs_buffer = gl.allocate_shared_memory(gl.int32, [4, ROWS // 2], FLAT)
    # Each of 64 threads ends its copies, and one of them the stores of all.
    q_full, q_free = allocate_barriers(2, 65), allocate_barriers(2, 2)
    k_full, k_free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    v_full, v_free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    table = (first_row_ptr, first_item_ptr, block_of_item_ptr)
    places = (k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h)
    first_item = gl.load(first_item_ptr + first_block)
    last_item = gl.load(first_item_ptr + last_block)
    gl.warp_specialize([
        (attend_half, (q_buffer, pairs_buffer, q_full, q_free, k_buffer, k_full, k_free, v_buffer,
                       v_full, v_free, partial_ptr, partial_lse_ptr, first_item, last_item, factor,
                       0, BLOCK_SIZE, ROWS, KEYS, DIM, STAGES)),
        (attend_half, (q_buffer, pairs_buffer, q_full, q_free, k_buffer, k_full, k_free, v_buffer,
                       v_full, v_free, partial_ptr, partial_lse_ptr, first_item, last_item, factor,
                       1, BLOCK_SIZE, ROWS, KEYS, DIM, STAGES)),
        (gather_queries, (q_ptr, pair_ptr, q_buffer, pairs_buffer, q_full, q_free, table,
                          first_item, last_item, n_blocks, first_query, first_kv_head, piece_pair,
                          kv_heads, q_len, q_stride_b, q_stride_h, GROUP, COUNT, ROWS, Q_STRIDE)),
        (copy_keys, (k_desc, v_desc, k_buffer, v_buffer, k_full, k_free, v_full, v_free,
                     block_of_item_ptr, places, first_item, last_item, n_blocks, first_kv_head,
                     kv_heads, BLOCK_SIZE, KEYS, DIM, STAGES)),
    ], [4, 2, 1], [REGISTERS, COPY_REGISTERS, COPY_REGISTERS])  # fmt: skip
