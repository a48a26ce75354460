"""The gradients of keys and values on Hopper, in Gluon, with a role for each warp.

A program processes a tile of 128 keys for the rows of an item. Its keys and values stay in shared
memory. Four warps gather queries, gradients of the output, log-sum-exps and deltas, 64 rows at a
time, into a ring of buffers. Two groups of four warps each add them to the gradients of 64 keys, so
that the softmax of one overlaps the products of the other. A pair of barriers for each buffer,
``full`` and ``free``, hands it from one role to the other; a role waits for the phase of its n-th
use.

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

from flexmoba.backends.fused.hopper_kernels import LOG2_E, allocate_barriers, copy_rows
from flexmoba.runtime.triton_launch import kernel


@gluon.jit
def gather_rows(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, own_ptr, pair_ptr, rows_buffer, vectors_buffer, full, free,
    begin, end, first_own, end_own, n_routed, n_tiles, first_key, head_query, first_query, q_len,
    first_position, q_stride_h, grad_stride_h,
    HAS_OWN: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    Q_STRIDE: gl.constexpr, GRAD_STRIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the rows of an item, and then those of own queries, to shared memory.

    ``vectors_buffer`` receives their log-sum-exps, in base 2, their deltas, and the last key that
    each row sees. Rows beyond the end repeat the last one and see no key.
    """
    row = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    own_tiles = (end_own - first_own + ROWS - 1) // ROWS
    pair = gl.load(pair_ptr + gl.maximum(gl.minimum(begin + row, end - 1), 0))
    for n in range(n_tiles):
        if n < n_routed:
            query = first_query - head_query + pair // COUNT
            valid = begin + n * ROWS + row < end
            last_key = row * 0 + KEYS
        else:
            head = (n - n_routed) // own_tiles
            position = first_own + (n - n_routed - head * own_tiles) * ROWS + row
            valid = position < end_own
            position = gl.minimum(position, end_own - 1)
            query = head * q_len + position - first_position
            last_key = position - first_key
            if HAS_OWN:
                valid = valid & (gl.load(own_ptr + (head_query + query)) != 0)
        lse = gl.load(lse_ptr + (head_query + query)) * LOG2_E
        delta = gl.load(delta_ptr + (head_query + query))
        # The pairs of the next tile, ahead of their use.
        next_row = gl.minimum(begin + (n + 1) * ROWS + row, end - 1)
        pair = gl.load(pair_ptr + gl.maximum(next_row, 0))
        head_in_group = query // q_len
        stage = n % STAGES
        mbarrier.wait(free.index(stage), n // STAGES & 1 ^ 1)
        copy_rows(
            q_ptr, rows_buffer.index(stage * 2), query, head_in_group, q_len, q_stride_h, Q_STRIDE,
            4,
        )  # fmt: skip
        copy_rows(
            grad_ptr, rows_buffer.index(stage * 2 + 1), query, head_in_group, q_len, grad_stride_h,
            GRAD_STRIDE, 4,
        )  # fmt: skip
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        vectors_buffer.index(stage * 3).store(gl.where(valid, lse, float("inf")))
        vectors_buffer.index(stage * 3 + 1).store(delta)
        vectors_buffer.index(stage * 3 + 2).store(gl.where(valid, last_key, -1).to(gl.float32))
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def add_rows(
    k, v, buffers, n, key, d_k, d_v, factor,
    ROWS: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
    IS_ROUTED: gl.constexpr,
):  # fmt: skip
    """Adds the rows of the n-th buffer to the gradients of 64 keys and values."""
    rows_buffer, vectors_buffer, full, free = buffers
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.full([64, ROWS], 0.0, gl.float32, SCORES)
    stage = n % STAGES
    q, grad = rows_buffer.index(stage * 2), rows_buffer.index(stage * 2 + 1)
    mbarrier.wait(full.index(stage), n // STAGES & 1)
    fence_async_shared()  # the products read what other warps have copied
    scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(v, grad.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = vectors_buffer.index(stage * 3).load(COLUMNS)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * factor - lse[None, :])
    if not IS_ROUTED:
        # The loop of a wait ends a basic block, even if the barrier is complete. So the compiler
        # loads the vectors of each block no earlier, and needs fewer registers.
        mbarrier.wait(full.index(stage), n // STAGES & 1)
        last_key = vectors_buffer.index(stage * 3 + 2).load(COLUMNS)
        weights = gl.where(key[:, None] <= last_key[None, :], weights, 0.0)
    half_weights = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
    if not IS_ROUTED:
        mbarrier.wait(full.index(stage), n // STAGES & 1)
    delta = vectors_buffer.index(stage * 3 + 1).load(COLUMNS)
    d_weights, weights = warpgroup_mma_wait(0, deps=[d_weights, weights])
    d_v = warpgroup_mma(half_weights, grad, d_v, is_async=True)
    d_scores = (weights * (d_weights - delta[None, :])).to(q.dtype)
    d_scores = gl.convert_layout(d_scores, WEIGHTS)
    d_k = warpgroup_mma(d_scores, q, d_k, is_async=True)
    # Products in flight at the end of an iteration would be serialised.
    d_k, d_v, half_weights, d_scores = warpgroup_mma_wait(
        0, deps=[d_k, d_v, half_weights, d_scores]
    )
    mbarrier.arrive(free.index(stage), count=1)
    return d_k, d_v


@gluon.jit
def key_half_grads(
    keys_buffer, rows_buffer, vectors_buffer, keys_full, full, free, d_k_ptr, d_v_ptr, extra_ptr,
    n_routed, n_tiles, n_keys, first_row, factor, scale,
    HALF: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Computes the gradients of one half of the keys and values, and writes them.

    ``n_keys`` is negative if they belong in ``extra``.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    k, v = keys_buffer.index(HALF), keys_buffer.index(2 + HALF)
    buffers = (rows_buffer, vectors_buffer, full, free)
    key = (HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))).to(gl.float32)
    d_k = gl.full([64, DIM], 0.0, gl.float32, GRADS)
    d_v = gl.full([64, DIM], 0.0, gl.float32, GRADS)
    mbarrier.wait(keys_full, 0)
    for n in range(n_routed):
        d_k, d_v = add_rows(
            k, v, buffers, n, key, d_k, d_v, factor, ROWS, STAGES, SCORES, WEIGHTS, True
        )
    for n in range(n_routed, n_tiles):
        d_k, d_v = add_rows(
            k, v, buffers, n, key, d_k, d_v, factor, ROWS, STAGES, SCORES, WEIGHTS, False
        )
    row = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, GRADS))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, GRADS))
    if n_keys > 0:
        mask = (row < n_keys)[:, None]
        offset = (first_row + row).to(gl.int64)[:, None] * DIM + dim[None, :]
        gl.store(d_k_ptr + offset, (d_k * scale).to(d_k_ptr.dtype.element_ty), mask=mask)
        gl.store(d_v_ptr + offset, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)
    else:
        mask = (row < -n_keys)[:, None]
        offset = (first_row + row).to(gl.int64)[:, None] * (2 * DIM) + dim[None, :]
        gl.store(extra_ptr + offset, d_k, mask=mask)
        gl.store(extra_ptr + offset + DIM, d_v, mask=mask)


@functools.partial(kernel, jit=gluon.jit)
def hopper_key_grads_kernel(
    q_ptr, k_desc, v_desc, grad_ptr, lse_ptr, delta_ptr, own_ptr, d_k_ptr, d_v_ptr, extra_ptr,
    pair_ptr, first_row_ptr, first_item_ptr, block_of_item_ptr, first_extra_ptr,
    k_row_b: gl.int32, k_row_h: gl.int32, k_column_h: gl.int32,
    v_row_b: gl.int32, v_row_h: gl.int32, v_column_h: gl.int32,
    q_stride_b: gl.int64, q_stride_h: gl.int32, grad_stride_b: gl.int64, grad_stride_h: gl.int32,
    first_query: gl.int32, first_kv_head: gl.int32, first_block: gl.int32, last_block: gl.int32,
    kv_heads: gl.int32, q_len: gl.int32, kv_len: gl.int32, n_blocks: gl.int32,
    factor: gl.float32, scale: gl.float32, item_rows: gl.int32,
    IS_CAUSAL: gl.constexpr, HAS_OWN: gl.constexpr, GROUP: gl.constexpr, COUNT: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    Q_STRIDE: gl.constexpr, GRAD_STRIDE: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Computes `key_grads_kernel` for tiles of 128 keys, without gradients of queries."""
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles_per_block: gl.constexpr = BLOCK_SIZE // KEYS
    item = gl.load(first_item_ptr + first_block) + gl.program_id(0) // tiles_per_block
    if item >= gl.load(first_item_ptr + last_block):
        return
    keys_buffer = gl.allocate_shared_memory(DTYPE, [4, KEYS // 2, DIM], SHARED)
    rows_buffer = gl.allocate_shared_memory(DTYPE, [STAGES * 2, ROWS, DIM], SHARED)
    vectors_buffer = gl.allocate_shared_memory(gl.float32, [STAGES * 3, ROWS], FLAT)
    keys_barrier, free = allocate_barriers(1, 1), allocate_barriers(STAGES, 2)
    # Each of 128 threads ends its copies, and one of them the stores of all.
    full = allocate_barriers(STAGES, 129)
    keys_full = keys_barrier.index(0)

    block = gl.load(block_of_item_ptr + item)
    bin = block + block // n_blocks
    first_item = gl.load(first_item_ptr + block)
    begin = gl.load(first_row_ptr + bin) + (item - first_item) * item_rows
    end = gl.minimum(begin + item_rows, gl.load(first_row_ptr + bin + 1))
    kv_head = first_kv_head + block // n_blocks
    batch = kv_head // kv_heads
    head = kv_head - batch * kv_heads
    block_key = block % n_blocks * BLOCK_SIZE
    block_end = gl.minimum(block_key + BLOCK_SIZE, kv_len)
    first_key = block_key + gl.program_id(0) % tiles_per_block * KEYS
    mbarrier.expect(keys_full, 2 * KEYS * DIM * 2)
    for half in gl.static_range(2):
        key = first_key + half * (KEYS // 2)
        tma.async_copy_global_to_shared(
            k_desc, [batch * k_row_b + head * k_row_h + key, head * k_column_h],
            keys_full, keys_buffer.index(half),
        )  # fmt: skip
        tma.async_copy_global_to_shared(
            v_desc, [batch * v_row_b + head * v_row_h + key, head * v_column_h],
            keys_full, keys_buffer.index(2 + half),
        )  # fmt: skip
    first_position = kv_len - q_len
    first_own = gl.maximum(first_key, first_position)
    end_own = block_end
    if not IS_CAUSAL:
        end_own = first_own
    if item != first_item:
        end_own = first_own
    q_ptr += (batch * q_stride_b + head * GROUP * q_stride_h) * 8
    grad_ptr += (batch * grad_stride_b + head * GROUP * grad_stride_h) * 8
    first_row = kv_head * kv_len + first_key
    n_keys = gl.maximum(block_end - first_key, 0)
    if gl.load(first_item_ptr + block + 1) != first_item + 1:  # several items
        buffer = gl.load(first_extra_ptr + block) - gl.load(first_extra_ptr + first_block)
        first_row = (buffer + item - first_item) * BLOCK_SIZE + first_key - block_key
        n_keys = -n_keys
    n_routed = (gl.maximum(end - begin, 0) + ROWS - 1) // ROWS
    n_tiles = n_routed + (gl.maximum(end_own - first_own, 0) + ROWS - 1) // ROWS * GROUP
    gl.warp_specialize([
        (key_half_grads, (keys_buffer, rows_buffer, vectors_buffer, keys_full, full, free, d_k_ptr,
                          d_v_ptr, extra_ptr, n_routed, n_tiles, n_keys, first_row, factor, scale,
                          0, ROWS, DIM, STAGES)),
        (key_half_grads, (keys_buffer, rows_buffer, vectors_buffer, keys_full, full, free, d_k_ptr,
                          d_v_ptr, extra_ptr, n_routed, n_tiles, n_keys, first_row, factor, scale,
                          1, ROWS, DIM, STAGES)),
        (gather_rows, (q_ptr, grad_ptr, lse_ptr, delta_ptr, own_ptr, pair_ptr, rows_buffer,
                       vectors_buffer, full, free, begin, end, first_own, end_own, n_routed,
                       n_tiles, first_key, kv_head * GROUP * q_len, first_query, q_len,
                       first_position, q_stride_h, grad_stride_h, HAS_OWN, COUNT, ROWS, KEYS,
                       Q_STRIDE, GRAD_STRIDE, STAGES)),
    ], [4, 4], [REGISTERS, COPY_REGISTERS])  # fmt: skip
