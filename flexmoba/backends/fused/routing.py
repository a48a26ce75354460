"""Sorts the pairs of a sort group by block, and divides the rows of each block into items."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.backends.fused.routing_kernels import (
    bin_kernel,
    count_kernel,
    first_rows_kernel,
    list_items_kernel,
    scatter_kernel,
)
from flexmoba.backends.fused.schedule import Sizes, SortGroup
from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.runtime.triton_launch import launch

_BIN_ROWS = 1024
# Pairs of a chunk of `count_kernel`, and the most bins, and chunks times bins, of a KV head for
# which two launches replace those of a sort. Every chunk reads the counts of all chunks of its KV
# head, and keeps those of some chunks in registers.
_CHUNK, _MAX_BINS, _MAX_COUNTS, _COUNTS_AT_ONCE = 1024, 512, 2**13, 4096
_BLOCKS = 32  # whose items or tiles a program lists


class Rows(NamedTuple):
    """The sorted pairs of a sort group.

    Attributes:
        pairs: ``(rows,)`` int32, the pair of each row.
        first_rows: ``(bins + 1,)`` int32, the first row of each bin.
    """

    pairs: Tensor
    first_rows: Tensor


class Items(NamedTuple):
    """The items, one for each program, of each block of a sort group.

    Attributes:
        of_keys: The first item of each block ``(blocks + 1,)``, and the block of each item, both
            int32.
        first_extra: ``(blocks + 1,)`` int32, the first extra buffer of each block with several
            items.
        of_queries: As ``of_keys``, for the forward pass or the gradients of queries, or None.
    """

    of_keys: tuple[Tensor, Tensor]
    first_extra: Tensor
    of_queries: tuple[Tensor, Tensor] | None


def sort_pairs(routed: Tensor, group: SortGroup, sizes: Sizes) -> tuple[Tensor, Rows]:
    """Sorts the pairs of a sort group by bin.

    The sort is stable, so the rows of a bin keep the order of their queries.

    Args:
        routed: ``(B, Hq, Lq, T)`` int32, the routed blocks of each query.
        group: The sort group.
        sizes: The sizes of the call.

    Returns:
        The bin of each row ``(rows,)``, int16 or int32, in ascending order, and the rows.
    """
    n_pairs = group.n_queries * sizes.count
    # A radix sort of two-byte keys is twice as fast as one of four-byte keys.
    dtype = torch.int16 if group.n_kv_heads * (sizes.n_blocks + 1) < 2**15 else torch.int32
    head_pairs = n_pairs // group.n_kv_heads  # a group of several KV heads holds all their queries
    width = next_power_of_2(sizes.n_blocks + 2)
    if width <= _MAX_BINS and 0 < ceil_div(head_pairs, _CHUNK) * width <= _MAX_COUNTS:
        return _sort_by_counting(routed, group, sizes, dtype)
    bins = routed.new_empty(n_pairs, dtype=dtype)
    launch(
        bin_kernel,
        -(-n_pairs // _BIN_ROWS),
        (
            *(routed, bins, group.first_query * sizes.count, n_pairs, group.first_query),
            *(sizes.group * sizes.q_len, sizes.n_blocks),
        ),
        {"COUNT": sizes.count, "ROWS": _BIN_ROWS},
        (dtype,),
    )
    bins, pairs = torch.sort(bins, stable=True)
    return bins, Rows(pairs.int(), first_rows_of_bins(bins, group, sizes))


def _sort_by_counting(
    routed: Tensor, group: SortGroup, sizes: Sizes, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    """Computes `sort_pairs` for few pairs, where the host limits the speed."""
    n_pairs = group.n_queries * sizes.count
    head_pairs = n_pairs // group.n_kv_heads
    n_chunks, width = ceil_div(head_pairs, _CHUNK), next_power_of_2(sizes.n_blocks + 2)
    n_programs = group.n_kv_heads * n_chunks
    counts = routed.new_empty(n_programs, width)
    bins, pairs = routed.new_empty(n_pairs, dtype=dtype), routed.new_empty(n_pairs)
    first_rows = routed.new_empty(group.n_kv_heads * (sizes.n_blocks + 1) + 1)
    numbers = group.first_query * sizes.count, n_pairs, head_pairs, n_chunks, sizes.n_blocks
    constants = {"CHUNK": _CHUNK, "BINS": width, "CHUNKS": min(16, _COUNTS_AT_ONCE // width)}
    launch(count_kernel, n_programs, (routed, counts, *numbers), constants, ())
    tensors = routed, counts, bins, pairs, first_rows
    launch(scatter_kernel, n_programs, (*tensors, *numbers), constants, (dtype,))
    return bins, Rows(pairs, first_rows)


def first_rows_of_bins(bins: Tensor, group: SortGroup, sizes: Sizes) -> Tensor:
    """Returns the first row of each bin and the number of rows, ``(bins + 1,)`` int32."""
    n_bins = group.n_kv_heads * (sizes.n_blocks + 1)
    first_rows = bins.new_empty(n_bins + 1, dtype=torch.int32)
    launch(
        first_rows_kernel,
        -(-(n_bins + 1) // 128),
        (bins, first_rows, n_bins, bins.shape[0]),
        {"TILE": 128},
        (bins.dtype,),
    )
    return first_rows


def items_of_blocks(
    first_rows: Tensor, item_rows: int, query_rows: int | None, group: SortGroup, sizes: Sizes
) -> Items:
    """Divides the rows of each block into items.

    The tables of items are as long as the largest possible number of items, because reading the
    number of items would wait for the device.

    Args:
        first_rows: ``(bins + 1,)`` int32, the first row of each bin.
        item_rows: The number of rows of an item, for the gradients of keys.
        query_rows: The number of rows of an item, for the forward pass or the gradients of queries;
            None for no items.
        group: The sort group.
        sizes: The sizes of the call.
    """
    n_blocks, n_pairs = group.n_kv_heads * sizes.n_blocks, group.n_queries * sizes.count

    def table(rows: int) -> tuple[Tensor, Tensor]:
        new_empty = first_rows.new_empty
        return new_empty(n_blocks + 1), new_empty(n_pairs // rows + n_blocks)

    first_item, block_of_item = table(item_rows)
    first_extra = first_rows.new_empty(n_blocks + 1)
    of_queries = None if query_rows is None else table(query_rows)
    launch(
        list_items_kernel,
        n_blocks // _BLOCKS + 1,
        (
            *(first_rows, first_item, first_extra, block_of_item, *(of_queries or (None, None))),
            *(n_blocks, sizes.n_blocks, item_rows),
        ),
        # A kernel without tables of queries is another kernel, which `launch` knows by QUERY_ROWS.
        {"QUERY_ROWS": query_rows or 1, "BLOCKS": _BLOCKS, "ITEMS": 32, "TILE": 1024},
        (),
    )
    return Items((first_item, block_of_item), first_extra, of_queries)
