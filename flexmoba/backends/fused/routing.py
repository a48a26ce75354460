"""Sorts the pairs of a sort group by block, and cuts the rows of each block into work items."""

import torch
from torch import Tensor

from flexmoba.backends.fused.routing_kernels import (
    bin_kernel,
    first_items_kernel,
    list_items_kernel,
)
from flexmoba.backends.fused.schedule import Sizes, SortGroup
from flexmoba.runtime.triton_launch import launch

_BIN_ROWS = 1024


def sort_pairs(routed: Tensor, group: SortGroup, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The bin and the pair of every row.

    The sort is stable: the rows of a bin keep the order of their queries.
    """
    n_pairs = group.n_queries * sizes.count
    # A radix sort of two bytes is twice as fast as one of four.
    dtype = torch.int16 if group.n_kv_heads * (sizes.n_blocks + 1) < 2**15 else torch.int32
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
    return bins, pairs.int()


def first_rows_of_bins(bins: Tensor, group: SortGroup, sizes: Sizes) -> Tensor:
    """The first row of each bin, ``(bins + 1,)`` int32; the last is the number of rows."""
    n_bins = group.n_kv_heads * (sizes.n_blocks + 1)
    index = torch.arange(n_bins + 1, dtype=bins.dtype, device=bins.device)
    return torch.searchsorted(bins, index, out_int32=True)


def first_items_of_blocks(
    first_rows: Tensor, item_rows: int, query_item_rows: int, group: SortGroup, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts the rows of each block into items; see `first_items_kernel`."""
    n_blocks = group.n_kv_heads * sizes.n_blocks
    first_item, first_extra, first_query_item = (
        first_rows.new_empty(n_blocks + 1) for _ in range(3)
    )
    launch(
        first_items_kernel,
        1,
        (
            *(first_rows, first_item, first_extra, first_query_item),
            *(n_blocks, sizes.n_blocks, item_rows),
        ),
        {"ROWS": query_item_rows, "TILE": 1024},
        (),
    )
    return first_item, first_extra, first_query_item


def blocks_of_items(first_item: Tensor, item_rows: int, group: SortGroup, sizes: Sizes) -> Tensor:
    """The block of each item. How many there are is not known here, but as many suffice."""
    n_blocks = group.n_kv_heads * sizes.n_blocks
    most = group.n_queries * sizes.count // item_rows + n_blocks
    block_of_item = first_item.new_empty(most)
    launch(list_items_kernel, n_blocks, (first_item, block_of_item), {"TILE": 128}, ())
    return block_of_item
