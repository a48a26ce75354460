"""The selection of Native Sparse Attention on CUDA, by two Triton kernels.

The first kernel computes the log-sum-exp of the scores of every query and head, unless the caller
has it from the compressed branch. The second kernel computes the scores again, a tile of compressed
blocks at a time, adds the softmax weights of the query heads of a KV head, sums them by the
overlaps with the blocks of the tile, and keeps the best blocks in registers. So no weight and
no importance is written to memory.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.backends.fused import is_split, padded_dim
from flexmoba.backends.fused.kernel_parts import dot_parts, load_parts
from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.gate.kernel import (
    MAX_COUNT,
    MAX_HEAD_DIM,
    NOTHING,
    blocks_of_keys,
    keep_best,
    nothing_yet,
)
from flexmoba.gate.lists import (
    best_of_lists,
    from_halves,
    halves,
    merge_half,
    merge_lists,
    sort_runs,
)
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.runtime import has_large_shared_memory
from flexmoba.runtime.triton_launch import kernel, launch, on_device_of, packed

_LN_2 = tl.constexpr(math.log(2))
_LOG2_E = tl.constexpr(1 / math.log(2))
_LEAST_TILE, _TILE = 64, 128  # compressed blocks of a tile
_LISTS = tl.constexpr(4)  # of a row, one in each of the threads that hold the row of a product
_MAX_LIST = 16  # keys of a list that fits in registers


def supports(q: Tensor, sizes: NsaSizes) -> bool:
    """Returns whether the kernels support these queries and sizes."""
    margin = ceil_div(sizes.cmp_block - sizes.cmp_stride, sizes.block_size)
    most = MAX_HEAD_DIM
    if q.element_size() > 2:  # by the shared memory of `lse_kernel`
        most = 192 if has_large_shared_memory(q.device) else 64
    few_dims = q.shape[-1] <= most
    # A tile must hold more blocks than its margin.
    return few_dims and sizes.scored <= MAX_COUNT and (margin + 1) * _room(sizes) <= _LEAST_TILE


def _room(sizes: NsaSizes) -> int:
    """Returns the places for the compressed blocks that begin in a block, a power of two."""
    return next_power_of_2(sizes.block_size // sizes.cmp_stride)


def select_on_cuda(
    q: Tensor,
    k_cmp: Tensor,
    first_block: Tensor | None,
    lse: Tensor | None,
    kv_len: int,
    sizes: NsaSizes,
    scale: float,
) -> Tensor:
    """Returns the selection, ``(B, Hkv, Lq, topk)`` int32, in the order of `nsa_select`.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, in single or half precision.
        k_cmp: Compressed keys, ``(B, Hkv, blocks, D)``, at least one.
        first_block: ``(B, Lq)`` int32, the first block of each query's document, or None.
        lse: The log-sum-exp of the compressed branch, ``(B, Hq, Lq)`` float32, or None.
        kv_len: Number of tokens.
        sizes: Sizes of the blocks and of the selection.
        scale: Factor on the scores.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, n_compressed = k_cmp.shape[1:3]
    q, k_cmp = packed(q), packed(k_cmp)
    first = q if first_block is None else packed(first_block.expand(batch, -1).int())
    r, s = sizes.block_size // sizes.cmp_stride, sizes.cmp_block // sizes.cmp_stride
    is_split_dim = is_split(dim)
    is_large = (dim > 128 and not is_split_dim) or q.element_size() > 2
    fits = not is_split_dim or has_large_shared_memory(q.device)
    tile = _LEAST_TILE if is_large or not fits else _TILE
    slots, room = next_power_of_2(sizes.scored), _room(sizes)
    constants = {
        "DIM": dim,
        "GROUP": heads // kv_heads,
        "HAS_FIRST": first_block is not None,
        "STRIDE": sizes.cmp_stride,
        "IN_BLOCK": r,
        "IN_COMPRESSED": s,
        "TILE_Q": 64,  # so that two programs fit on a multiprocessor of an H100
        "TILE_N": tile,
        "TILE_D": max(16, padded_dim(dim)),
        "COUNT": sizes.scored,
        "SLOTS": slots,
        "ROOM": room,
        "USE_LISTS": not is_large and slots <= _MAX_LIST and room <= tile // int(_LISTS),
        "SINKS": sizes.sink_blocks,
        "LOCALS": sizes.local_blocks,
        "num_warps": 4,
        "num_stages": 2,
    }
    tiles = ceil_div(q_len, constants["TILE_Q"])
    numbers = q_len, kv_len - q_len, n_compressed, kv_heads, scale / math.log(2)
    selected = torch.empty(batch, kv_heads, q_len, sizes.topk, dtype=torch.int32, device=q.device)
    with on_device_of(q):
        if lse is None:
            lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
            launch(
                lse_kernel,
                tiles * batch * heads,
                (q, k_cmp, first, lse, *numbers),
                constants,
                (q.dtype,),
            )
        launch(
            importance_kernel,
            tiles * batch * kv_heads,
            (q, k_cmp, first, packed(lse), selected, *numbers),
            # With three tiles of queries, one is copied during the exponentials of another. Three
            # tiles of 192 dims would leave room for one program on a multiprocessor of an H100.
            constants | {"num_stages": 2 if is_large or is_split_dim else 3},
            (q.dtype,),
        )
    return selected


@triton.jit
def _seen(
    row, batch, q_len, offset, first_ptr,
    HAS_FIRST: tl.constexpr, STRIDE: tl.constexpr, IN_BLOCK: tl.constexpr,
    IN_COMPRESSED: tl.constexpr,
):  # fmt: skip
    """Returns the first block of each query, its first compressed block and the end of those."""
    row = tl.minimum(row, q_len - 1)
    first = tl.zeros_like(row)
    if HAS_FIRST:
        first += tl.load(first_ptr + batch.to(tl.int64) * q_len + row)
    # The number of strides of `STRIDE` tokens up to the query, less those of a compressed block.
    end = (row + offset + 1) // STRIDE - (IN_COMPRESSED - 1)
    return first, first * IN_BLOCK, tl.maximum(end, 0)


@triton.jit
def _load_keys(k_ptr, compressed, n_compressed, DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Loads the parts of a tile of compressed keys, clamped to those that exist."""
    real = tl.maximum(tl.minimum(compressed, n_compressed - 1), 0).to(tl.int64)
    return load_parts(k_ptr, real * DIM, DIM, TILE_D)


@triton.jit
def _load_queries(q_ptr, head, row, q_len, DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Loads the parts of a tile of queries of a flat head, clamped to those that exist."""
    real = head.to(tl.int64) * q_len + tl.minimum(row, q_len - 1)
    return load_parts(q_ptr, real * DIM, DIM, TILE_D)


@kernel
def lse_kernel(
    q_ptr, k_ptr, first_ptr, lse_ptr,
    q_len: tl.int32, offset: tl.int32, n_compressed: tl.int32, kv_heads: tl.int32,
    factor: tl.float32,
    DIM: tl.constexpr, GROUP: tl.constexpr, HAS_FIRST: tl.constexpr, STRIDE: tl.constexpr,
    IN_BLOCK: tl.constexpr, IN_COMPRESSED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Writes the log-sum-exp of the scores of a tile of queries of one head."""
    tiles = tl.cdiv(q_len, TILE_Q)
    head = tl.program_id(0) // tiles
    # The last queries see the most compressed blocks, so they start first.
    row = (tiles - 1 - tl.program_id(0) % tiles) * TILE_Q + tl.arange(0, TILE_Q)
    batch = head // (kv_heads * GROUP)
    _, begin, end = _seen(
        row, batch, q_len, offset, first_ptr, HAS_FIRST, STRIDE, IN_BLOCK, IN_COMPRESSED
    )
    q = _load_queries(q_ptr, head, row, q_len, DIM, TILE_D)
    k_ptr += (head // GROUP).to(tl.int64) * n_compressed * DIM
    highest = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    for start in range(tl.min(begin, 0) // TILE_N * TILE_N, tl.max(end, 0), TILE_N):
        compressed = start + tl.arange(0, TILE_N)
        k = _load_keys(k_ptr, compressed, n_compressed, DIM, TILE_D)
        score = dot_parts(q, k, "tf32x3") * factor
        seen = (compressed[None, :] >= begin[:, None]) & (compressed[None, :] < end[:, None])
        score = tl.where(seen, score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(score - base[:, None]), 1)
        highest = new_highest
    base = tl.where(highest == float("-inf"), 0.0, highest)
    out = lse_ptr + head.to(tl.int64) * q_len + row
    tl.store(out, (base + tl.log2(total)) * _LN_2, mask=row < q_len)


@triton.jit
def _importance(
    weights,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, ROOM: tl.constexpr, MARGIN: tl.constexpr,
    IN_BLOCK: tl.constexpr, IN_COMPRESSED: tl.constexpr,
):  # fmt: skip
    """Returns the importances ``(TILE_Q, blocks)`` of the blocks of a tile."""
    TILE_BLOCKS: tl.constexpr = TILE_N // ROOM
    in_block = tl.arange(0, ROOM)
    block_in_tile = tl.arange(0, TILE_BLOCKS)
    weights = tl.reshape(weights, [TILE_Q, TILE_BLOCKS, ROOM])
    importance = tl.zeros([TILE_Q, TILE_BLOCKS], tl.float32)
    for later in tl.static_range(MARGIN + 1):
        # The overlap, in strides, of a compressed block with the block that is `later` blocks
        # after the block in which it begins.
        overlap = tl.minimum(in_block + IN_COMPRESSED, (later + 1) * IN_BLOCK)
        overlap = tl.maximum(overlap - tl.maximum(in_block, later * IN_BLOCK), 0)
        part = tl.sum(weights * overlap.to(tl.float32)[None, None, :], 2)
        if later > 0:
            source = tl.maximum(block_in_tile - later, 0)[None, :]
            part = tl.gather(part, tl.broadcast_to(source, [TILE_Q, TILE_BLOCKS]), 1)
        importance += part
    return importance


@triton.jit
def _shifted(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Returns ``x (A, B, N)``, as rows of ``B * N``, shifted by one place, with 0 in the first.

    The place before ``i`` is ``i`` with all bits up to its lowest set bit flipped. Elements of the
    last dimension only change their names in the registers of a thread.
    """
    index = tl.arange(0, N)[None, None, :]
    last = tl.sum(tl.where(index == N - 1, x, 0.0), 2)
    previous = tl.arange(0, B)[:, None] == tl.arange(0, B)[None, :] - 1
    last = tl.sum(tl.where(previous[None, :, :], last[:, :, None], 0.0), 1)
    y = tl.broadcast_to(last[:, :, None], [A, B, N])
    for bit in tl.static_range(6):
        if 1 << bit < N:
            low, high = halves(x, A, B, N, 1 << bit)
            x = from_halves(high, low, A, B, N)
            y = tl.where((index & ((2 << bit) - 1)) == (1 << bit), x, y)
    return y


@triton.jit
def _importance_in_lists(
    weights,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, ROOM: tl.constexpr, MARGIN: tl.constexpr,
    IN_BLOCK: tl.constexpr, IN_COMPRESSED: tl.constexpr,
):  # fmt: skip
    """Returns the importances of the blocks of a tile, ``(TILE_Q, _LISTS, blocks of a list)``.

    Of every 8 columns of a matrix product, a thread holds two neighbors. These columns are the
    compressed blocks of consecutive blocks, so that a thread adds their weights by itself.
    """
    BLOCKS: tl.constexpr = TILE_N // (_LISTS * ROOM)
    in_block = tl.arange(0, ROOM)
    weights = tl.reshape(weights, [TILE_Q, TILE_N // (2 * _LISTS), _LISTS, 2])
    weights = tl.reshape(tl.permute(weights, [0, 2, 1, 3]), [TILE_Q, _LISTS, BLOCKS, ROOM])
    importance = tl.zeros([TILE_Q, _LISTS, BLOCKS], tl.float32)
    for i in tl.static_range(MARGIN + 1):
        later = MARGIN - i
        overlap = tl.minimum(in_block + IN_COMPRESSED, (later + 1) * IN_BLOCK)
        overlap = tl.maximum(overlap - tl.maximum(in_block, later * IN_BLOCK), 0)
        if i > 0:
            importance = _shifted(importance, TILE_Q, _LISTS, BLOCKS)
        importance += tl.sum(weights * overlap.to(tl.float32)[None, None, None, :], 3)
    return importance


@triton.jit
def _keep_best_in_lists(best, key, TILE_Q: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr):
    """Merges sort keys ``(TILE_Q, _LISTS, BLOCKS)`` into lists ``(TILE_Q, _LISTS, SLOTS)``."""
    key = sort_runs(key, TILE_Q, _LISTS, BLOCKS, min(BLOCKS, SLOTS))
    for i in tl.static_range(6):
        if BLOCKS >> i > SLOTS:
            key = merge_half(key, TILE_Q, _LISTS, BLOCKS >> i, SLOTS)
        if BLOCKS << i < SLOTS:
            key = tl.reshape(key, [TILE_Q, _LISTS, 1, BLOCKS << i])
            nothing = tl.full([TILE_Q, _LISTS, 1, BLOCKS << i], NOTHING, tl.int64)
            key = from_halves(key, nothing, TILE_Q, _LISTS, BLOCKS << (i + 1))
    return merge_lists(best, key, TILE_Q, _LISTS, SLOTS)


@triton.jit
def _store_forced(
    selected_ptr, row, q_len, first, own,
    SINKS: tl.constexpr, LOCALS: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """Stores the own block, local blocks and sink blocks; a block that is both is a sink block."""
    selected_ptr += row.to(tl.int64) * TOPK
    tl.store(selected_ptr, own, mask=row < q_len)
    for i in tl.static_range(LOCALS):
        local = own - 1 - i
        local = tl.where(local >= first + SINKS, local, -1)
        tl.store(selected_ptr + 1 + i, local, mask=row < q_len)
    for i in tl.static_range(SINKS):
        sink = tl.where(first + i < own, first + i, -1)
        tl.store(selected_ptr + 1 + LOCALS + i, sink, mask=row < q_len)


@kernel
def importance_kernel(
    q_ptr, k_ptr, first_ptr, lse_ptr, selected_ptr,
    q_len: tl.int32, offset: tl.int32, n_compressed: tl.int32, kv_heads: tl.int32,
    factor: tl.float32,
    DIM: tl.constexpr, GROUP: tl.constexpr, HAS_FIRST: tl.constexpr, STRIDE: tl.constexpr,
    IN_BLOCK: tl.constexpr, IN_COMPRESSED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, ROOM: tl.constexpr, USE_LISTS: tl.constexpr,
    SINKS: tl.constexpr, LOCALS: tl.constexpr,
):  # fmt: skip
    """Selects the most important blocks of a tile of tokens of one KV head.

    A tile holds the compressed blocks that begin in TILE_BLOCKS blocks, ROOM places for each block.
    Compressed blocks of the first MARGIN blocks overlap later blocks; these have the importance
    from a tile before.
    """
    MARGIN: tl.constexpr = (IN_COMPRESSED + IN_BLOCK - 2) // IN_BLOCK
    TILE_BLOCKS: tl.constexpr = TILE_N // ROOM
    tiles = tl.cdiv(q_len, TILE_Q)
    kv_head = tl.program_id(0) // tiles
    row = (tiles - 1 - tl.program_id(0) % tiles) * TILE_Q + tl.arange(0, TILE_Q)
    batch = kv_head // kv_heads
    first, begin, end = _seen(
        row, batch, q_len, offset, first_ptr, HAS_FIRST, STRIDE, IN_BLOCK, IN_COMPRESSED
    )
    own = (tl.minimum(row, q_len - 1) + offset) // (STRIDE * IN_BLOCK)
    FORCED: tl.constexpr = 1 + LOCALS + SINKS
    selected_ptr += kv_head.to(tl.int64) * q_len * (FORCED + COUNT)
    _store_forced(selected_ptr, row, q_len, first, own, SINKS, LOCALS, FORCED + COUNT)
    first_candidate = first + SINKS
    end_candidate = own - LOCALS
    k_ptr += kv_head.to(tl.int64) * n_compressed * DIM
    place = tl.arange(0, TILE_N)
    block_in_tile = tl.arange(0, TILE_BLOCKS)
    if USE_LISTS:
        # A list has consecutive blocks, in the columns that one thread holds.
        place = place // 2 % _LISTS * (TILE_N // _LISTS) + place // (2 * _LISTS) * 2 + place % 2
        best = tl.full([TILE_Q, _LISTS, SLOTS], NOTHING, tl.int64)
    else:
        slot, best = nothing_yet(TILE_Q, COUNT, SLOTS)
    for first_block in range(
        tl.min(first_candidate, 0) - MARGIN, tl.max(end_candidate, 0), TILE_BLOCKS - MARGIN
    ):
        compressed = (first_block + place // ROOM) * IN_BLOCK + place % ROOM
        k = _load_keys(k_ptr, compressed, n_compressed, DIM, TILE_D)
        weights = tl.zeros([TILE_Q, TILE_N], tl.float32)
        for head_in_group in range(GROUP):
            head = kv_head * GROUP + head_in_group
            q = _load_queries(q_ptr, head, row, q_len, DIM, TILE_D)
            lse = tl.load(lse_ptr + head.to(tl.int64) * q_len + tl.minimum(row, q_len - 1))
            score = dot_parts(q, k, "tf32x3") * factor
            weights += tl.exp2(score - (lse * _LOG2_E)[:, None])
        seen = (compressed[None, :] >= begin[:, None]) & (compressed[None, :] < end[:, None])
        if ROOM != IN_BLOCK:
            seen = seen & (place % ROOM < IN_BLOCK)[None, :]
        weights = tl.where(seen, weights, 0.0)
        if USE_LISTS:
            importance = _importance_in_lists(
                weights, TILE_Q, TILE_N, ROOM, MARGIN, IN_BLOCK, IN_COMPRESSED
            )
            tile_block = tl.reshape(block_in_tile, [1, _LISTS, TILE_BLOCKS // _LISTS])
            first_of, end_of = first_candidate[:, None, None], end_candidate[:, None, None]
        else:
            importance = _importance(weights, TILE_Q, TILE_N, ROOM, MARGIN, IN_BLOCK, IN_COMPRESSED)
            tile_block = tl.reshape(block_in_tile, [1, TILE_BLOCKS])
            first_of, end_of = first_candidate[:, None], end_candidate[:, None]
        block = first_block + tile_block
        # Importances are not negative, so their bits are in the order of their values.
        bits = importance.to(tl.int32, bitcast=True)
        bits = tl.where(importance != importance, 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) | block.to(tl.int64)
        candidate = (block >= first_of) & (block < end_of) & (tile_block >= MARGIN)
        key = tl.where(candidate, key, NOTHING)
        if USE_LISTS:
            best = _keep_best_in_lists(best, key, TILE_Q, TILE_BLOCKS // _LISTS, SLOTS)
        else:
            best = keep_best(best, key)
    if USE_LISTS:
        best = best_of_lists(best, TILE_Q, _LISTS, SLOTS)
        column = tl.arange(0, SLOTS)[None, :]
    else:
        best = tl.sort(best, descending=True)  # unused slots come first
        column = slot - (SLOTS - COUNT)
    tl.store(
        selected_ptr + row.to(tl.int64)[:, None] * (FORCED + COUNT) + FORCED + column,
        blocks_of_keys(best),
        mask=(row < q_len)[:, None] & (column >= 0) & (column < COUNT),
    )
