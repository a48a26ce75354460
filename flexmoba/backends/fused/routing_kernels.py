"""Triton kernels that prepare the sort of pairs by block, and divide blocks into items.

`kernel_parts` defines the terms and sizes.
"""

import triton
import triton.language as tl

from flexmoba.runtime.triton_launch import kernel


@kernel
def bin_kernel(
    routed_ptr, bin_ptr,
    first_pair: tl.int64, n_pairs: tl.int32, first_query: tl.int32,
    queries_per_kv_head: tl.int32, n_blocks: tl.int32,
    COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes the bin of every pair."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = pair < n_pairs
    block = tl.load(routed_ptr + first_pair + tl.minimum(pair, n_pairs - 1))
    kv_head = (first_query + pair // COUNT) // queries_per_kv_head
    kv_head -= first_query // queries_per_kv_head
    bin = kv_head * (n_blocks + 1) + tl.where(block >= 0, block, n_blocks)
    tl.store(bin_ptr + pair, bin.to(bin_ptr.dtype.element_ty), mask=valid)


@triton.jit
def blocks_of_chunk(
    routed_ptr, chunk, n_chunks, first_pair, n_pairs, head_pairs, n_blocks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Returns the blocks of the pairs of a chunk, and which pairs are in its KV head.

    A KV head has ``n_chunks`` chunks. A pair without a block has the block ``n_blocks``.
    """
    row = chunk % n_chunks * CHUNK + tl.arange(0, CHUNK)
    pair = chunk // n_chunks * head_pairs + row
    block = tl.load(routed_ptr + first_pair + tl.minimum(pair, n_pairs - 1))
    return tl.where(block >= 0, block, n_blocks), row < head_pairs


@kernel
def count_kernel(
    routed_ptr, count_ptr,
    first_pair: tl.int64, n_pairs: tl.int32, head_pairs: tl.int32, n_chunks: tl.int32,
    n_blocks: tl.int32,
    CHUNK: tl.constexpr, BINS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Writes the number of pairs of every block in a chunk of the pairs of a KV head."""
    chunk = tl.program_id(0)
    block, real = blocks_of_chunk(
        routed_ptr, chunk, n_chunks, first_pair, n_pairs, head_pairs, n_blocks, CHUNK
    )
    counts = tl.histogram(tl.where(real, block, BINS - 1), BINS)
    tl.store(count_ptr + chunk * BINS + tl.arange(0, BINS), counts)


@kernel
def scatter_kernel(
    routed_ptr, count_ptr, bin_ptr, pair_ptr, first_row_ptr,
    first_pair: tl.int64, n_pairs: tl.int32, head_pairs: tl.int32, n_chunks: tl.int32,
    n_blocks: tl.int32,
    CHUNK: tl.constexpr, BINS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Writes the pairs of a chunk, and their bins, to their places in the order of bins.

    The first chunk of a KV head also writes the first row of each of its bins.
    """
    chunk = tl.program_id(0)
    kv_head, chunk_of_head = chunk // n_chunks, chunk % n_chunks
    bin = tl.arange(0, BINS)
    # Pairs of each bin in all chunks of the KV head, and in the chunks before this one.
    total, before = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
    for start in range(0, n_chunks, CHUNKS):
        other = start + tl.arange(0, CHUNKS)
        counts = tl.load(
            count_ptr + (kv_head * n_chunks + other)[:, None] * BINS + bin[None, :],
            mask=(other < n_chunks)[:, None] & (bin <= n_blocks)[None, :],
            other=0,
        )
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < chunk_of_head)[:, None], counts, 0), 0)
    first_row = kv_head * head_pairs + tl.cumsum(total) - total
    if chunk_of_head == 0:
        bins_before = kv_head * (n_blocks + 1)
        tl.store(first_row_ptr + bins_before + bin, first_row, mask=bin <= n_blocks)
        if (kv_head + 1) * head_pairs == n_pairs:
            tl.store(first_row_ptr + bins_before + n_blocks + 1, n_pairs)
    own = tl.load(count_ptr + chunk * BINS + bin)
    shift = first_row + before - (tl.cumsum(own) - own)
    block, real = blocks_of_chunk(
        routed_ptr, chunk, n_chunks, first_pair, n_pairs, head_pairs, n_blocks, CHUNK
    )
    # Sorts blocks and rows together: of equal blocks, the earlier row comes first.
    key = tl.where(real, block, BINS - 1) * CHUNK + tl.arange(0, CHUNK)
    key = tl.sort(key)
    block, row = key // CHUNK, key % CHUNK + chunk_of_head * CHUNK
    place = tl.gather(shift, block, 0) + tl.arange(0, CHUNK)
    real = row < head_pairs
    tl.store(pair_ptr + place, kv_head * head_pairs + row, mask=real)
    bins = kv_head * (n_blocks + 1) + block
    tl.store(bin_ptr + place, bins.to(bin_ptr.dtype.element_ty), mask=real)


@kernel
def first_rows_kernel(
    bin_ptr, first_row_ptr, n_bins: tl.int32, n_rows: tl.int32, TILE: tl.constexpr
):
    """Writes the first row of every bin, and the number of rows, by binary search."""
    bin = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low = tl.zeros([TILE], tl.int32)
    high = low + n_rows
    while tl.max(high - low, 0) > 0:
        middle = low + (high - low) // 2
        is_open = low < high
        is_before = tl.load(bin_ptr + middle, mask=is_open, other=0).to(tl.int32) < bin
        low = tl.where(is_open & is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    tl.store(first_row_ptr + bin, low, mask=bin <= n_bins)


@triton.jit
def rows_of_blocks(first_row_ptr, block, end, n_blocks):
    """Returns the first row and the number of rows of every block, 0 from the block ``end`` on."""
    bin = block + block // n_blocks
    first = tl.load(first_row_ptr + bin, mask=block < end, other=0)
    return first, tl.load(first_row_ptr + bin + 1, mask=block < end, other=0) - first


@triton.jit
def items_of_blocks(first_row_ptr, block, end, n_blocks, item_rows, QUERY_ROWS: tl.constexpr):
    """Returns the numbers of items that `list_items_kernel` counts, 0 from the block ``end`` on."""
    _, rows = rows_of_blocks(first_row_ptr, block, end, n_blocks)
    items = tl.where(block < end, tl.maximum(tl.cdiv(rows, item_rows), 1), 0)
    return items, tl.where(items > 1, items, 0), tl.cdiv(rows, QUERY_ROWS)


@triton.jit
def store_blocks(block_of_item_ptr, block, first_item, n_items, ITEMS: tl.constexpr):
    """Writes the block of every item, ITEMS items of each block at a time."""
    for start in range(0, tl.max(n_items), ITEMS):
        item = start + tl.arange(0, ITEMS)[None, :]
        value, _ = tl.broadcast(block[:, None], item)
        place = block_of_item_ptr + first_item[:, None] + item
        tl.store(place, value, mask=item < n_items[:, None])


@kernel
def list_items_kernel(
    first_row_ptr, first_item_ptr, first_extra_ptr, block_of_item_ptr,
    first_query_item_ptr, block_of_query_item_ptr,
    all_blocks: tl.int32, n_blocks: tl.int32, item_rows: tl.int32,
    QUERY_ROWS: tl.constexpr, BLOCKS: tl.constexpr, ITEMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Divides the rows of every block into items; writes their first items and the items' blocks.

    ``first_item`` counts items of ``item_rows`` rows, at least one for each block, for the
    gradients of keys. ``first_extra`` counts only the items of blocks with several items.
    ``first_query_item`` counts items of QUERY_ROWS rows, for the gradients of queries, if there are
    tables of them. Every program counts the items of all blocks before its own.
    """
    first = tl.program_id(0) * BLOCKS
    items, extra, query_items = 0, 0, 0
    for start in range(0, first, TILE):
        n_items, n_extra, n_query_items = items_of_blocks(
            first_row_ptr, start + tl.arange(0, TILE), first, n_blocks, item_rows, QUERY_ROWS
        )
        items += tl.sum(n_items)
        extra += tl.sum(n_extra)
        query_items += tl.sum(n_query_items)
    block = first + tl.arange(0, BLOCKS)
    n_items, n_extra, n_query_items = items_of_blocks(
        first_row_ptr, block, all_blocks, n_blocks, item_rows, QUERY_ROWS
    )
    first_item = items + tl.cumsum(n_items) - n_items
    tl.store(first_item_ptr + block, first_item, mask=block <= all_blocks)
    store_blocks(block_of_item_ptr, block, first_item, n_items, ITEMS)
    first_extra = extra + tl.cumsum(n_extra) - n_extra
    tl.store(first_extra_ptr + block, first_extra, mask=block <= all_blocks)
    if first_query_item_ptr is not None:
        first_query_item = query_items + tl.cumsum(n_query_items) - n_query_items
        tl.store(first_query_item_ptr + block, first_query_item, mask=block <= all_blocks)
        store_blocks(block_of_query_item_ptr, block, first_query_item, n_query_items, ITEMS)
