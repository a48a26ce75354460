"""The attention of routed blocks of 128 keys on Hopper, in Gluon: a block stays in shared memory.

Each program processes consecutive tiles of 64 rows, and so several tiles of one block. One warp
copies the keys and values of each block, another gathers the queries of each tile, and two groups
of four warps attend in turns, each from one tile, so that the softmax of one overlaps the products
of the other. `hopper_kernels` explains the barriers.
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

from flexmoba.backends.fused.hopper_kernels import (
    allocate_barriers,
    load_pairs,
    load_tile,
    place_of_block,
    query_offsets,
    store_partial,
)
from flexmoba.runtime.triton_launch import kernel


@gluon.jit
def copy_blocks(
    k_desc, v_desc, k_buffer, v_buffer, full, free, table, places, first_tile, last_tile, n_blocks,
    first_kv_head, kv_heads,
    BLOCK_SIZE: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the keys and values of each block to shared memory, once for all its tiles."""
    n = 0
    last_block = -1
    for tile in range(first_tile, last_tile):
        block, _, _ = load_tile(tile, table)
        if block != last_block:
            k_row, k_column, v_row, v_column = place_of_block(
                block, places, n_blocks, first_kv_head, kv_heads, BLOCK_SIZE
            )
            stage = n % STAGES
            mbarrier.wait(free.index(stage), n // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), BLOCK_SIZE * DIM * 4)
            tma.async_copy_global_to_shared(
                k_desc, [k_row, k_column], full.index(stage), k_buffer.index(stage)
            )
            tma.async_copy_global_to_shared(
                v_desc, [v_row, v_column], full.index(stage), v_buffer.index(stage)
            )
            n += 1
        last_block = block


@gluon.jit
def gather_tiles(
    q_ptr, pair_ptr, q_buffer, full, free, table, first_tile, last_tile, sizes,
    GROUP: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    Q_STRIDE: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the queries of each tile to shared memory, while those of the tile before arrive."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [1, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    q_stride_b, q_stride_h, n_blocks, first_query, first_kv_head, kv_heads, q_len = sizes
    n = 0
    for tile in range(first_tile, last_tile):
        block, begin, end = load_tile(tile, table)
        stage = n % STAGES
        mbarrier.wait(free.index(stage), n // STAGES & 1 ^ 1)
        for part in gl.static_range(ROWS // 16):
            index = gl.minimum(begin + part * 16 + row, end - 1)
            offset = query_offsets(
                block, index, pair_ptr, q_stride_b, q_stride_h, n_blocks, first_query,
                first_kv_head, kv_heads, q_len, GROUP, COUNT, Q_STRIDE, UNIT,
            )  # fmt: skip
            async_copy.async_copy_global_to_shared(
                q_buffer.index(stage).slice(part * 16, 16), q_ptr + offset[:, None] + dim[None, :]
            )
        async_copy.commit_group()
        async_copy.wait_group(1)  # all but this tile
        fence_async_shared()
        mbarrier.arrive(full.index((n + STAGES - 1) % STAGES), count=1, pred=n > 0)
        n += 1
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.arrive(full.index((n + STAGES - 1) % STAGES), count=1, pred=n > 0)


@gluon.jit
def attend_tiles(
    q_buffer, k_buffer, v_buffer, q_full, q_free, full, free, partial_ptr, partial_lse_ptr,
    pair_ptr, table, first_tile, last_tile, piece_pair, factor,
    TURN: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Computes the partial outputs of every second tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    n_blocks_seen = 0
    n = 0
    last_block = -1
    next_block, next_begin, next_end = load_tile(first_tile, table)
    for tile in range(first_tile, last_tile):
        block, begin, end = next_block, next_begin, next_end
        next_block, next_begin, next_end = load_tile(gl.minimum(tile + 1, last_tile - 1), table)
        stage = (n_blocks_seen + STAGES - 1) % STAGES
        if block != last_block:
            # Both groups wait for every block and free it, whether they have a tile of it or not.
            mbarrier.arrive(free.index(stage), count=1, pred=n_blocks_seen > 0)
            stage = n_blocks_seen % STAGES
            mbarrier.wait(full.index(stage), n_blocks_seen // STAGES & 1)
            n_blocks_seen += 1
        last_block = block
        if n % 2 == TURN:
            q_stage = n % Q_STAGES
            q = q_buffer.index(q_stage)
            lse_pairs = load_pairs(
                begin, end, pair_ptr, piece_pair, ROWS, gl.SliceLayout(1, SCORES)
            )
            out_pairs = load_pairs(
                begin, end, pair_ptr, piece_pair, ROWS, gl.SliceLayout(1, STORED)
            )
            zeros = gl.full([ROWS, BLOCK_SIZE], 0.0, gl.float32, SCORES)
            mbarrier.wait(q_full.index(q_stage), n // Q_STAGES & 1)
            k = k_buffer.index(stage).permute((1, 0))
            scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            highest = gl.max(scores, 1) * factor
            weights = gl.exp2(scores * factor - highest[:, None])
            total = gl.sum(weights, 1)
            weights = gl.convert_layout(weights.to(v_buffer.dtype), WEIGHTS)
            out = gl.full([ROWS, DIM], 0.0, gl.float32, OUT)
            out = warpgroup_mma(weights, v_buffer.index(stage), out, use_acc=False, is_async=True)
            out, weights = warpgroup_mma_wait(0, deps=[out, weights])
            out = out * gl.convert_layout(1.0 / total, OUT_ROWS)[:, None]
            store_partial(
                out, highest + gl.log2(total), q, lse_pairs, out_pairs, partial_ptr,
                partial_lse_ptr, DIM, STORED,
            )  # fmt: skip
            mbarrier.arrive(q_free.index(q_stage), count=1)
        n += 1


@functools.partial(kernel, jit=gluon.jit)
def hopper_block_kernel(
    q_ptr, k_desc, v_desc, partial_ptr, partial_lse_ptr, pair_ptr, first_tile_ptr, block_ptr,
    begin_ptr, end_ptr,
    q_stride_b: gl.int64, q_stride_h: gl.int64,
    k_row_b: gl.int32, k_row_h: gl.int32, k_column_h: gl.int32,
    v_row_b: gl.int32, v_row_h: gl.int32, v_column_h: gl.int32,
    first_block: gl.int32, last_block: gl.int32, first_query: gl.int32, first_kv_head: gl.int32,
    piece_pair: gl.int32, kv_heads: gl.int32, q_len: gl.int32, n_blocks: gl.int32,
    factor: gl.float32,
    GROUP: gl.constexpr, COUNT: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    DIM: gl.constexpr, Q_STRIDE: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Computes `hopper_attend_kernel` for blocks of one tile of keys."""
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_buffer = gl.allocate_shared_memory(DTYPE, [Q_STAGES, ROWS, DIM], SHARED)
    k_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_SIZE, DIM], SHARED)
    v_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_SIZE, DIM], SHARED)
    q_full, q_free = allocate_barriers(Q_STAGES, 1), allocate_barriers(Q_STAGES, 1)
    full, free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    table = (block_ptr, begin_ptr, end_ptr)
    places = (k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h)
    sizes = (q_stride_b, q_stride_h, n_blocks, first_query, first_kv_head, kv_heads, q_len)
    begin = gl.load(first_tile_ptr + first_block)
    n_tiles = (gl.load(first_tile_ptr + last_block) - begin).to(gl.int64)
    first_tile = begin + (n_tiles * gl.program_id(0) // gl.num_programs(0)).to(gl.int32)
    last_tile = begin + (n_tiles * (gl.program_id(0) + 1) // gl.num_programs(0)).to(gl.int32)
    gl.warp_specialize([
        (attend_tiles, (q_buffer, k_buffer, v_buffer, q_full, q_free, full, free, partial_ptr,
                        partial_lse_ptr, pair_ptr, table, first_tile, last_tile, piece_pair, factor,
                        0, BLOCK_SIZE, ROWS, DIM, STAGES, Q_STAGES)),
        (attend_tiles, (q_buffer, k_buffer, v_buffer, q_full, q_free, full, free, partial_ptr,
                        partial_lse_ptr, pair_ptr, table, first_tile, last_tile, piece_pair, factor,
                        1, BLOCK_SIZE, ROWS, DIM, STAGES, Q_STAGES)),
        (copy_blocks, (k_desc, v_desc, k_buffer, v_buffer, full, free, table, places, first_tile,
                       last_tile, n_blocks, first_kv_head, kv_heads, BLOCK_SIZE, DIM, STAGES)),
        (gather_tiles, (q_ptr, pair_ptr, q_buffer, q_full, q_free, table, first_tile, last_tile,
                        sizes, GROUP, COUNT, ROWS, DIM, Q_STRIDE, UNIT, Q_STAGES)),
    ], [4, 1, 1], [REGISTERS, COPY_REGISTERS, COPY_REGISTERS])  # fmt: skip
