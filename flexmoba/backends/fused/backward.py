"""Launches the kernels of the backward pass."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.backends.fused.backward_kernels import (
    delta_kernel,
    finish_query_grads_kernel,
    item_query_grads_kernel,
    key_grads_kernel,
    sum_extra_kernel,
)
from flexmoba.backends.fused.routing import (
    blocks_of_items,
    first_items_of_blocks,
    first_rows_of_bins,
    sort_pairs,
)
from flexmoba.backends.fused.schedule import Sizes, SortGroup, cut
from flexmoba.backends.fused.strides import aligned, head_strides, token_stride
from flexmoba.backends.fused.tile_sizes import DELTA_ROWS, backward_constants, is_roomy
from flexmoba.blocks import ceil_div
from flexmoba.runtime.triton_launch import launch, packed
from flexmoba.selection import BlockSelection

# Rows of a block that one program takes: the average number of rows times a factor so large that
# few blocks need a second program, and so small that the rows of a block that most queries selected
# are shared among several.
_ITEM_FACTOR, _LEAST_ITEM = 4, 1024


class _Items(NamedTuple):
    """The rows of a sort group, and the items that programs take of each block.

    Attributes:
        pairs: The pair of each row.
        first_rows: The first row of each bin.
        rows: Rows of an item, for the gradients of keys.
        of_keys: The first item of each block, and the block of each item.
        first_extra: The first extra buffer of each block of several items.
        of_queries: As ``of_keys``, for the gradients of queries; None if key tiles are blocks.
        most_extra: Extra buffers that suffice.
    """

    pairs: Tensor
    first_rows: Tensor
    rows: int
    of_keys: tuple[Tensor, Tensor]
    first_extra: Tensor
    of_queries: tuple[Tensor, Tensor] | None
    most_extra: int


def _items_of(
    routed: Tensor, group: SortGroup, sizes: Sizes, query_rows: int, *, for_queries: bool
) -> _Items:
    bins, pairs = sort_pairs(routed, group, sizes)
    first_rows = first_rows_of_bins(bins, group, sizes)
    per_block = pairs.shape[0] // (group.n_kv_heads * sizes.n_blocks)
    rows = max(_LEAST_ITEM, _ITEM_FACTOR * per_block)
    first_item, first_extra, first_query_item = first_items_of_blocks(
        first_rows, rows, query_rows, group, sizes
    )
    of_keys = first_item, blocks_of_items(first_item, rows, group, sizes)
    # A block of several items has less than twice as many as its rows fill.
    most_extra = 2 * group.most_queries * sizes.count // rows
    of_queries = None
    if for_queries:
        block_of_item = blocks_of_items(first_query_item, query_rows, group, sizes)
        of_queries = first_query_item, block_of_item
    return _Items(pairs, first_rows, rows, of_keys, first_extra, of_queries, most_extra)


def attend_backward_on_cuda(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    selection: BlockSelection,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    q, k, v, grad_out = (aligned(x) for x in (*inputs, grad_out))
    routed, own = packed(selection.routed), None if selection.own is None else packed(selection.own)
    sizes = Sizes.of(q, k, v, routed, selection.block_size)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides, unit = head_strides(q, k, v, grad_out)
    layout = unit, *(token_stride(x) for x in (q, k, v, grad_out))
    key_tile, query_tile, finish, of_delta = backward_constants(
        sizes, layout, is_causal, own is not None, is_roomy(q.device)
    )
    factor, dtypes = scale / math.log(2), (q.dtype,)
    tiles_per_block = ceil_div(sizes.block_size, key_tile["KEYS"])
    with torch.cuda.device_of(q):
        delta = torch.empty_like(lse)
        launch(
            delta_kernel,
            ceil_div(lse.numel(), DELTA_ROWS),
            (
                *(grad_out, out, packed(grad_lse), delta, *strides[-2:]),
                *(lse.numel(), sizes.q_len, sizes.heads),
            ),
            of_delta,
            dtypes,
        )
        tensors: tuple[Any, ...] = (q, k, v, grad_out, lse, delta)
        for group in cut(sizes, whole_kv_heads=True):
            items = _items_of(
                *(routed, group, sizes, query_tile["ROWS"]), for_queries=tiles_per_block > 1
            )
            extra = lse.new_empty(items.most_extra, sizes.block_size, sizes.dim + sizes.value_dim)
            parts = q.new_empty(group.most_queries * sizes.count, sizes.dim)
            for piece in group.pieces:
                n_pairs = piece.n_queries * sizes.count
                numbers = (
                    *(*strides, group.first_query, group.first_kv_head, piece.first_block),
                    piece.first_block + piece.n_blocks,
                    (piece.first_query - group.first_query) * sizes.count,
                    *(sizes.kv_heads, sizes.q_len, sizes.kv_len, sizes.n_blocks, factor, scale),
                )
                launch(
                    key_grads_kernel,
                    (n_pairs // items.rows + piece.n_blocks) * tiles_per_block,
                    (
                        *(*tensors, own, d_k, d_v, extra, parts, items.pairs, items.first_rows),
                        *(*items.of_keys, items.first_extra, *numbers, items.rows),
                    ),
                    key_tile,
                    dtypes,
                )
                if items.most_extra:
                    launch(
                        sum_extra_kernel,
                        piece.n_blocks * tiles_per_block,
                        (
                            *(extra, d_k, d_v, items.of_keys[0], items.first_extra),
                            *(piece.first_block, group.first_kv_head, sizes.kv_len),
                            *(sizes.n_blocks, scale),
                        ),
                        key_tile,
                        dtypes,
                    )
                if items.of_queries is not None:
                    launch(
                        item_query_grads_kernel,
                        n_pairs // query_tile["ROWS"] + piece.n_blocks if n_pairs else 0,
                        (
                            *(*tensors, parts, items.pairs, items.first_rows),
                            *(*items.of_queries, *numbers),
                        ),
                        query_tile,
                        dtypes,
                    )
                launch(
                    finish_query_grads_kernel,
                    piece.n_tiles,
                    (
                        *(*tensors, parts, routed, own, d_q, *strides),
                        *(piece.first_tile, piece.first_query, sizes.heads, sizes.kv_heads),
                        *(sizes.q_len, sizes.kv_len, factor, scale),
                    ),
                    finish,
                    dtypes,
                )
            del parts, extra  # before the next sort group makes its own
    return d_q, d_k, d_v
