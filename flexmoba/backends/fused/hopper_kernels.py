"""The attention of routed blocks on Hopper, in Gluon, with a role for each warp.

Each program processes one tile of 128 rows after another. One warp copies the keys and values of
the tile's block, another gathers its queries, and two groups of four warps each attend from 64 rows
to the keys, so that the softmax of one overlaps the products of the other. Buffers in shared memory
hold two tiles of keys, of values and of queries. A pair of barriers for each buffer, ``full`` and
``free``, hands it from one role to the other; a role waits for the phase of its n-th use.

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
def load_tile(tile, table):
    """Returns the block of a tile, counted over all KV heads, and the range of its rows."""
    block_ptr, begin_ptr, end_ptr = table
    return gl.load(block_ptr + tile), gl.load(begin_ptr + tile), gl.load(end_ptr + tile)


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
def query_offsets(
    block, index, pair_ptr, q_stride_b, q_stride_h, n_blocks, first_query, first_kv_head, kv_heads,
    q_len,
    GROUP: gl.constexpr, COUNT: gl.constexpr, Q_STRIDE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """Returns the offsets of the queries of rows, given by their indices, of a block."""
    kv_head = first_kv_head + block // n_blocks
    batch = kv_head // kv_heads
    head = (kv_head - batch * kv_heads) * GROUP * q_stride_h
    query = first_query - kv_head * GROUP * q_len + gl.load(pair_ptr + index) // COUNT
    head_in_group = query // q_len
    offset = (batch * q_stride_b + head + head_in_group * q_stride_h) * UNIT
    return offset + (query - head_in_group * q_len).to(gl.int64) * Q_STRIDE


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
    k_desc, v_desc, k_buffer, v_buffer, k_full, k_free, v_full, v_free, table, places, first_tile,
    last_tile, n_blocks, first_kv_head, kv_heads,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the keys and values of each tile's block to shared memory."""
    n = 0
    for tile in range(first_tile + gl.program_id(0), last_tile, gl.num_programs(0)):
        block, _, _ = load_tile(tile, table)
        k_row, k_column, v_row, v_column = place_of_block(
            block, places, n_blocks, first_kv_head, kv_heads, BLOCK_SIZE
        )
        for start in range(0, BLOCK_SIZE, KEYS):
            stage = n % STAGES
            phase = n // STAGES & 1 ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), KEYS * DIM * 2)
            tma.async_copy_global_to_shared(
                k_desc, [k_row + start, k_column], k_full.index(stage),
                k_buffer.index(stage),
            )  # fmt: skip
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_full.index(stage), KEYS * DIM * 2)
            tma.async_copy_global_to_shared(
                v_desc, [v_row + start, v_column], v_full.index(stage),
                v_buffer.index(stage),
            )  # fmt: skip
            n += 1


@gluon.jit
def gather_queries(
    q_ptr, pair_ptr, q_buffer, q_full, q_free, table, first_tile, last_tile, sizes,
    GROUP: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    Q_STRIDE: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the queries of each tile to shared memory; rows beyond its end repeat the last one."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [1, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    q_stride_b, q_stride_h, n_blocks, first_query, first_kv_head, kv_heads, q_len = sizes
    n = 0
    for tile in range(first_tile + gl.program_id(0), last_tile, gl.num_programs(0)):
        block, begin, end = load_tile(tile, table)
        stage = n % STAGES
        mbarrier.wait(q_free.index(stage), n // STAGES & 1 ^ 1)
        for half in gl.static_range(2):
            for part in gl.static_range(ROWS // 32):
                index = gl.minimum(begin + half * (ROWS // 2) + part * 16 + row, end - 1)
                offset = query_offsets(
                    block, index, pair_ptr, q_stride_b, q_stride_h, n_blocks, first_query,
                    first_kv_head, kv_heads, q_len, GROUP, COUNT, Q_STRIDE, UNIT,
                )  # fmt: skip
                async_copy.async_copy_global_to_shared(
                    q_buffer.index(stage * 2 + half).slice(part * 16, 16),
                    q_ptr + offset[:, None] + dim[None, :],
                )
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
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
def attend_half(
    q_buffer, k_buffer, v_buffer, q_full, q_free, k_full, k_free, v_full, v_free,
    partial_ptr, partial_lse_ptr, pair_ptr, table, first_tile, last_tile, piece_pair, factor,
    HALF: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    DIM: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """Computes the partial outputs of one half of the rows of each tile."""
    M: gl.constexpr = ROWS // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    n = 0
    n_queries = 0
    for tile in range(first_tile + gl.program_id(0), last_tile, gl.num_programs(0)):
        q_stage = n_queries % STAGES
        q = q_buffer.index(q_stage * 2 + HALF)
        zeros = gl.full([M, KEYS], 0.0, gl.float32, SCORES)
        highest = gl.full([M], float("-inf"), gl.float32, SCORE_ROWS)
        total = gl.full([M], 0.0, gl.float32, SCORE_ROWS)
        out = gl.full([M, DIM], 0.0, gl.float32, OUT)
        mbarrier.wait(q_full.index(q_stage), n_queries // STAGES & 1)
        mbarrier.wait(k_full.index(n % STAGES), n // STAGES & 1)
        k = k_buffer.index(n % STAGES).permute((1, 0))
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(n % STAGES), count=1)
        weights, highest, total, decay = add_scores(scores, highest, total, factor)
        weights = gl.convert_layout(weights.to(v_buffer.dtype), WEIGHTS)
        if ORDERED:
            mbarrier.wait(k_full.index((n + 1) % STAGES), (n + 1) // STAGES & 1)
        for start in range(KEYS, BLOCK_SIZE, KEYS):
            m = n + 1
            if not ORDERED:
                mbarrier.wait(k_full.index(m % STAGES), m // STAGES & 1)
            k = k_buffer.index(m % STAGES).permute((1, 0))
            scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
            out = warpgroup_mma(weights, v_buffer.index(n % STAGES), out, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_free.index(m % STAGES), count=1)
            new_weights, highest, total, decay = add_scores(scores, highest, total, factor)
            new_weights = gl.convert_layout(new_weights.to(v_buffer.dtype), WEIGHTS)
            # The compiler would move the softmax behind the wait for the second product. The loop
            # of a wait for a barrier ends a basic block, which keeps the order. The new weights
            # are among the dependencies for the same reason.
            if ORDERED:
                mbarrier.wait(
                    k_full.index((m + 1) % STAGES), (m + 1) // STAGES & 1,
                    pred=start + KEYS < BLOCK_SIZE,
                )  # fmt: skip
            out, weights, new_weights = warpgroup_mma_wait(0, deps=[out, weights, new_weights])
            mbarrier.arrive(v_free.index(n % STAGES), count=1)
            out = out * gl.convert_layout(decay, OUT_ROWS)[:, None]
            weights = new_weights
            n = m
        mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
        out = warpgroup_mma(weights, v_buffer.index(n % STAGES), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=[out, weights])
        mbarrier.arrive(v_free.index(n % STAGES), count=1)
        n += 1

        out = out * gl.convert_layout(1.0 / total, OUT_ROWS)[:, None]
        _, begin, end = load_tile(tile, table)
        begin += HALF * M
        store_partial(
            out, highest + gl.log2(total), q,
            load_pairs(begin, end, pair_ptr, piece_pair, M, SCORE_ROWS),
            load_pairs(begin, end, pair_ptr, piece_pair, M, gl.SliceLayout(1, STORED)),
            partial_ptr, partial_lse_ptr, DIM, STORED,
        )  # fmt: skip
        mbarrier.arrive(q_free.index(q_stage), count=1)
        n_queries += 1


@gluon.jit
def load_pairs(begin, end, pair_ptr, piece_pair, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Loads the pairs of rows, counted from the first pair of the piece, and a mask of rows."""
    row = begin + gl.arange(0, N, layout=LAYOUT)
    return gl.load(pair_ptr + gl.minimum(row, end - 1)) - piece_pair, row < end


@gluon.jit
def store_partial(
    out, lse, buffer, lse_pairs, out_pairs, partial_ptr, partial_lse_ptr,
    DIM: gl.constexpr, STORED: gl.constexpr,
):  # fmt: skip
    """Writes partial outputs through shared memory, so that rows are written whole.

    ``lse_pairs`` and ``out_pairs`` are from `load_pairs`, in the layout of ``lse`` and of the rows
    of ``STORED``.
    """
    partial, valid = lse_pairs
    gl.store(partial_lse_ptr + partial, lse, mask=valid)
    buffer.store(out.to(buffer.dtype))
    out_rows = buffer.load(STORED)
    partial, valid = out_pairs
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, STORED))
    offset = partial.to(gl.int64)[:, None] * DIM + dim[None, :]
    gl.store(partial_ptr + offset, out_rows, mask=valid[:, None])
    fence_async_shared()


@functools.partial(kernel, jit=gluon.jit)
def hopper_attend_kernel(
    q_ptr, k_desc, v_desc, partial_ptr, partial_lse_ptr, pair_ptr, first_tile_ptr, block_ptr,
    begin_ptr, end_ptr,
    q_stride_b: gl.int64, q_stride_h: gl.int64,
    k_row_b: gl.int32, k_row_h: gl.int32, k_column_h: gl.int32,
    v_row_b: gl.int32, v_row_h: gl.int32, v_column_h: gl.int32,
    first_block: gl.int32, last_block: gl.int32, first_query: gl.int32, first_kv_head: gl.int32,
    piece_pair: gl.int32, kv_heads: gl.int32, q_len: gl.int32, n_blocks: gl.int32,
    factor: gl.float32,
    GROUP: gl.constexpr, COUNT: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, DIM: gl.constexpr, Q_STRIDE: gl.constexpr, UNIT: gl.constexpr,
    STAGES: gl.constexpr, ORDERED: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Computes the partial outputs of a piece, with their log-sum-exps in base 2.

    The products need about 200 registers of a thread, and the copies few: the program starts with
    168 for each of 12 warps, and the roles redistribute them.
    """
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_buffer = gl.allocate_shared_memory(DTYPE, [STAGES * 2, ROWS // 2, DIM], SHARED)
    k_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], SHARED)
    v_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DIM], SHARED)
    q_full, q_free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    k_full, k_free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    v_full, v_free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    table = (block_ptr, begin_ptr, end_ptr)
    places = (k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h)
    sizes = (q_stride_b, q_stride_h, n_blocks, first_query, first_kv_head, kv_heads, q_len)
    first_tile = gl.load(first_tile_ptr + first_block)
    last_tile = gl.load(first_tile_ptr + last_block)
    gl.warp_specialize([
        (attend_half, (q_buffer, k_buffer, v_buffer, q_full, q_free, k_full, k_free, v_full, v_free,
                       partial_ptr, partial_lse_ptr, pair_ptr, table, first_tile, last_tile,
                       piece_pair, factor, 0, BLOCK_SIZE, ROWS, KEYS, DIM, STAGES, ORDERED)),
        (attend_half, (q_buffer, k_buffer, v_buffer, q_full, q_free, k_full, k_free, v_full, v_free,
                       partial_ptr, partial_lse_ptr, pair_ptr, table, first_tile, last_tile,
                       piece_pair, factor, 1, BLOCK_SIZE, ROWS, KEYS, DIM, STAGES, ORDERED)),
        (copy_keys, (k_desc, v_desc, k_buffer, v_buffer, k_full, k_free, v_full, v_free, table,
                     places, first_tile, last_tile, n_blocks, first_kv_head, kv_heads,
                     BLOCK_SIZE, KEYS, DIM, STAGES)),
        (gather_queries, (q_ptr, pair_ptr, q_buffer, q_full, q_free, table, first_tile, last_tile,
                          sizes, GROUP, COUNT, ROWS, DIM, Q_STRIDE, UNIT, STAGES)),
    ], [4, 1, 1], [REGISTERS, COPY_REGISTERS, COPY_REGISTERS])  # fmt: skip
