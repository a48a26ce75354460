"""The gradients of queries from routed blocks on Hopper, in Gluon, with a role for each warp.

Each program processes one item of 128 rows after another. One warp copies the keys and values of
the item's block, two warps gather its queries and gradients of the output, and two groups of four
warps each compute the gradients of 64 rows. The queries of an item move to registers, and the next
ones take their place in shared memory. Barriers hand over the buffers, as in `hopper_kernels`.

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

from flexmoba.backends.fused.hopper_kernels import (
    LOG2_E,
    allocate_barriers,
    copy_rows,
    place_of_block,
    rows_of_item,
)
from flexmoba.runtime.triton_launch import kernel


@gluon.jit
def copy_keys(
    k_desc, v_desc, keys_buffer, full, free, block_of_item_ptr, places, first_item, last_item,
    n_blocks, first_kv_head, kv_heads,
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
            mbarrier.wait(free.index(stage), n // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), 2 * KEYS * DIM * 2)
            tma.async_copy_global_to_shared(
                k_desc, [k_row + start, k_column], full.index(stage), keys_buffer.index(stage * 2)
            )
            tma.async_copy_global_to_shared(
                v_desc, [v_row + start, v_column], full.index(stage),
                keys_buffer.index(stage * 2 + 1),
            )  # fmt: skip
            n += 1


@gluon.jit
def gather_items(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, pair_ptr, q_buffer, grad_buffer, vectors_buffer,
    pairs_buffer, full, free, table, first_item, last_item, n_blocks, first_query,
    first_kv_head, piece_pair, kv_heads, q_len, q_stride_b, q_stride_h, grad_stride_b,
    grad_stride_h,
    GROUP: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, Q_STRIDE: gl.constexpr,
    GRAD_STRIDE: gl.constexpr,
):  # fmt: skip
    """Copies the rows of each item to shared memory; rows beyond its end repeat the last one.

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
        grad_head = grad_ptr + (batch * grad_stride_b + head * grad_stride_h) * 8
        stage = n & 1
        mbarrier.wait(free, n & 1 ^ 1)
        for half in gl.static_range(2):
            index = begin + half * (ROWS // 2) + row
            pair = gl.load(pair_ptr + gl.minimum(index, end - 1))
            query = first_query + pair // COUNT
            lse = gl.load(lse_ptr + query) * LOG2_E
            delta = gl.load(delta_ptr + query)
            query -= kv_head * GROUP * q_len
            head_in_group = query // q_len
            copy_rows(
                q_head, q_buffer.index(half), query, head_in_group, q_len, q_stride_h, Q_STRIDE,
                2,
            )  # fmt: skip
            copy_rows(
                grad_head, grad_buffer.index(stage * 2 + half), query, head_in_group, q_len,
                grad_stride_h, GRAD_STRIDE, 2,
            )  # fmt: skip
            vectors_buffer.index(half * 2).store(lse)
            vectors_buffer.index(half * 2 + 1).store(delta)
            pairs_buffer.index(half).store(gl.where(index < end, pair - piece_pair, -1))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        mbarrier.arrive(full.index(stage), count=1)
        n += 1


@gluon.jit
def query_half_grads(
    keys_buffer, q_buffer, grad_buffer, vectors_buffer, pairs_buffer, keys_full, keys_free, full,
    free, partial_ptr, first_item, last_item, factor, scale,
    HALF: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Computes the gradients of one half of the rows of each item.

    The gradients of the scores of a tile of keys overlap the products of its predecessor.
    """
    M: gl.constexpr = ROWS // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROWS_OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    SCORES_OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    n = 0
    n_items = 0
    zeros = gl.full([M, KEYS], 0.0, gl.float32, SCORES)
    for _ in range(first_item + gl.program_id(0), last_item, gl.num_programs(0)):
        mbarrier.wait(full.index(n_items & 1), n_items // 2 & 1)
        fence_async_shared()  # the products read what other warps have copied
        q = q_buffer.index(HALF).load(ROWS_OPERAND)
        grad = grad_buffer.index((n_items & 1) * 2 + HALF)
        lse = vectors_buffer.index(HALF * 2).load(SCORE_ROWS)
        delta = vectors_buffer.index(HALF * 2 + 1).load(SCORE_ROWS)
        pair = pairs_buffer.index(HALF).load(gl.SliceLayout(1, STORED))
        # All but the gradients of the output are in registers. The buffer of those of the item
        # before is free, too.
        mbarrier.arrive(free, count=1)
        d_q = gl.full([M, DIM], 0.0, gl.float32, GRADS)
        mbarrier.wait(keys_full.index(n % STAGES), n // STAGES & 1)
        k = keys_buffer.index(n % STAGES * 2).permute((1, 0))
        v = keys_buffer.index(n % STAGES * 2 + 1).permute((1, 0))
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        d_weights = warpgroup_mma(grad, v, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        weights = gl.exp2(scores * factor - lse[:, None])
        d_weights, weights = warpgroup_mma_wait(0, deps=[d_weights, weights])
        d_scores = (weights * (d_weights - delta[:, None])).to(keys_buffer.dtype)
        d_scores = gl.convert_layout(d_scores, SCORES_OPERAND)
        mbarrier.wait(keys_full.index((n + 1) % STAGES), (n + 1) // STAGES & 1)
        for start in range(KEYS, BLOCK_SIZE, KEYS):
            m = n + 1
            k = keys_buffer.index(m % STAGES * 2).permute((1, 0))
            v = keys_buffer.index(m % STAGES * 2 + 1).permute((1, 0))
            scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            d_weights = warpgroup_mma(grad, v, zeros, use_acc=False, is_async=True)
            d_q = warpgroup_mma(d_scores, keys_buffer.index(n % STAGES * 2), d_q, is_async=True)
            scores = warpgroup_mma_wait(2, deps=[scores])
            weights = gl.exp2(scores * factor - lse[:, None])
            # The compiler would move the exponentials behind the wait for the second product, and
            # the gradients behind the wait for the third. The loop of a wait for a barrier ends a
            # basic block, which keeps the order.
            has_next = start + KEYS < BLOCK_SIZE
            next_full, phase = keys_full.index((m + 1) % STAGES), (m + 1) // STAGES & 1
            mbarrier.wait(next_full, phase, pred=has_next)
            d_weights, weights = warpgroup_mma_wait(1, deps=[d_weights, weights])
            new_scores = (weights * (d_weights - delta[:, None])).to(keys_buffer.dtype)
            new_scores = gl.convert_layout(new_scores, SCORES_OPERAND)
            mbarrier.wait(next_full, phase, pred=has_next)
            d_q, d_scores, new_scores = warpgroup_mma_wait(0, deps=[d_q, d_scores, new_scores])
            mbarrier.arrive(keys_free.index(n % STAGES), count=1)
            d_scores = new_scores
            n = m
        d_q = warpgroup_mma(d_scores, keys_buffer.index(n % STAGES * 2), d_q, is_async=True)
        d_q, d_scores = warpgroup_mma_wait(0, deps=[d_q, d_scores])
        mbarrier.arrive(keys_free.index(n % STAGES), count=1)
        n += 1

        # Through shared memory, so that rows are written whole.
        grad.store((d_q * scale).to(grad.dtype))
        dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, STORED))
        offset = pair.to(gl.int64)[:, None] * DIM + dim[None, :]
        gl.store(partial_ptr + offset, grad.load(STORED), mask=(pair >= 0)[:, None])
        n_items += 1


@functools.partial(kernel, jit=gluon.jit)
def hopper_query_grads_kernel(
    q_ptr, k_desc, v_desc, grad_ptr, lse_ptr, delta_ptr, partial_ptr,
    pair_ptr, first_row_ptr, first_item_ptr, block_of_item_ptr,
    k_row_b: gl.int32, k_row_h: gl.int32, k_column_h: gl.int32,
    v_row_b: gl.int32, v_row_h: gl.int32, v_column_h: gl.int32,
    q_stride_b: gl.int64, q_stride_h: gl.int32, grad_stride_b: gl.int64, grad_stride_h: gl.int32,
    first_query: gl.int32, first_kv_head: gl.int32, first_block: gl.int32, last_block: gl.int32,
    piece_pair: gl.int32, kv_heads: gl.int32, q_len: gl.int32, n_blocks: gl.int32,
    factor: gl.float32, scale: gl.float32,
    GROUP: gl.constexpr, COUNT: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, DIM: gl.constexpr, Q_STRIDE: gl.constexpr, GRAD_STRIDE: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Computes `item_query_grads_kernel`; each program processes one item after another."""
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    M: gl.constexpr = ROWS // 2
    keys_buffer = gl.allocate_shared_memory(DTYPE, [STAGES * 2, KEYS, DIM], SHARED)
    q_buffer = gl.allocate_shared_memory(DTYPE, [2, M, DIM], SHARED)
    grad_buffer = gl.allocate_shared_memory(DTYPE, [4, M, DIM], SHARED)
    vectors_buffer = gl.allocate_shared_memory(gl.float32, [4, M], FLAT)
    pairs_buffer = gl.allocate_shared_memory(gl.int32, [2, M], FLAT)
    keys_full, keys_free = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    # Each of 64 threads ends its copies, and one of them the stores of all.
    full, free = allocate_barriers(2, 65), allocate_barriers(1, 2).index(0)
    table = (first_row_ptr, first_item_ptr, block_of_item_ptr)
    places = (k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h)
    first_item = gl.load(first_item_ptr + first_block)
    last_item = gl.load(first_item_ptr + last_block)
    gl.warp_specialize([
        (query_half_grads, (keys_buffer, q_buffer, grad_buffer, vectors_buffer, pairs_buffer,
                            keys_full, keys_free, full, free, partial_ptr, first_item,
                            last_item, factor, scale, 0, BLOCK_SIZE, ROWS, KEYS, DIM, STAGES)),
        (query_half_grads, (keys_buffer, q_buffer, grad_buffer, vectors_buffer, pairs_buffer,
                            keys_full, keys_free, full, free, partial_ptr, first_item,
                            last_item, factor, scale, 1, BLOCK_SIZE, ROWS, KEYS, DIM, STAGES)),
        (gather_items, (q_ptr, grad_ptr, lse_ptr, delta_ptr, pair_ptr, q_buffer, grad_buffer,
                        vectors_buffer, pairs_buffer, full, free, table, first_item,
                        last_item, n_blocks, first_query, first_kv_head, piece_pair, kv_heads,
                        q_len, q_stride_b, q_stride_h, grad_stride_b, grad_stride_h, GROUP, COUNT,
                        ROWS, Q_STRIDE, GRAD_STRIDE)),
        (copy_keys, (k_desc, v_desc, keys_buffer, keys_full, keys_free, block_of_item_ptr, places,
                     first_item, last_item, n_blocks, first_kv_head, kv_heads, BLOCK_SIZE, KEYS,
                     DIM, STAGES)),
    ], [4, 2, 1], [REGISTERS, COPY_REGISTERS, COPY_REGISTERS])  # fmt: skip
