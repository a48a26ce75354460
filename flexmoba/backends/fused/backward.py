"""The backward pass: launches its kernels, one piece after another.

A pass over a sort group computes the gradients of keys, those of queries, or both.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.backends.fused import hopper
from flexmoba.backends.fused.backward_kernels import (
    delta_kernel,
    finish_query_grads_kernel,
    item_query_grads_kernel,
    key_grads_kernel,
    sum_extra_kernel,
)
from flexmoba.backends.fused.routing import Rows, items_of_blocks, sort_pairs
from flexmoba.backends.fused.schedule import Sizes, SortGroup, rows_of_items, sort_groups
from flexmoba.backends.fused.strides import head_strides, token_stride
from flexmoba.backends.fused.tile_sizes import DELTA_ROWS, backward_constants
from flexmoba.blocks import ceil_div
from flexmoba.runtime import has_large_shared_memory
from flexmoba.runtime.triton_launch import aligned, launch, on_device_of, packed
from flexmoba.selection import BlockSelection

_LEAST_ITEM, _ITEMS = 1024, 2048  # of `rows_of_items`


def _sorted_rows(routed: Tensor, group: SortGroup, sizes: Sizes, rows: Rows | None) -> Rows:
    """Returns the sorted pairs of a sort group: those of the forward pass, or sorts them."""
    if rows is not None and group.n_queries == sizes.batch * sizes.heads * sizes.q_len:
        return rows
    _, rows = sort_pairs(routed, group, sizes)
    return rows


def _item_rows(sizes: Sizes, tiles_per_block: int) -> int:
    """Returns the number of rows of an item, for the gradients of keys."""
    n_rows = sizes.batch * sizes.heads * sizes.q_len * sizes.count
    n_blocks = sizes.batch * sizes.kv_heads * sizes.n_blocks
    # With several programs for each item, even short calls occupy a GPU.
    items = _ITEMS if tiles_per_block == 1 else 1
    return rows_of_items(n_rows, n_blocks, _LEAST_ITEM, items)


def _max_extra(n_pairs: int, item_rows: int) -> int:
    """Returns an upper bound of the number of extra buffers for some pairs.

    A block with several items has less than twice as many items as its rows fill.
    """
    return 2 * n_pairs // item_rows


class _Pass(NamedTuple):
    """A sort group, and the gradients to compute from its pairs."""

    group: SortGroup
    for_keys: bool
    for_queries: bool


def _passes(sizes: Sizes, item_rows: int) -> Iterator[_Pass]:
    """Yields passes over all queries that compute the gradients of keys and of queries.

    The gradient of a key needs all queries of its KV head. If the gradients that the pairs of one
    KV head contribute to their queries do not fit, they are computed after those of keys, in
    smaller sort groups.
    """
    pair_bytes = 2 * sizes.dim * sizes.count
    extra_size = 4 * sizes.block_size * (sizes.dim + sizes.value_dim)
    per_kv_head = sizes.group * sizes.q_len
    max_extra = _max_extra(per_kv_head * sizes.count, item_rows)
    extra_bytes = max_extra * extra_size // per_kv_head
    groups = sort_groups(sizes, pair_bytes + extra_bytes)
    if all(group.n_queries % per_kv_head == 0 for group in groups):
        for group in groups:
            yield _Pass(group, True, True)
        return
    for group in sort_groups(sizes, extra_bytes, whole_kv_heads=True):
        yield _Pass(group, True, False)
    for group in sort_groups(sizes, pair_bytes):
        yield _Pass(group, False, True)


def attend_backward_on_cuda(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    results: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    selection: BlockSelection,
    scale: float,
    is_causal: bool,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v.

    Args:
        grad_out: ``(B, Hq, Lq, Dv)``, the gradient of the output.
        grad_lse: ``(B, Hq, Lq)`` float32, the gradient of the log-sum-exp, or None for zeros.
        results: The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)`` float32.
        inputs: Queries ``(B, Hq, Lq, D)``, keys ``(B, Hkv, Lk, D)``, values ``(B, Hkv, Lk, Dv)``.
        selection: The blocks of each query.
        scale: Factor on the scores, at least 0.
        is_causal: Whether queries attend to their own blocks.
        rows: The sorted pairs of all queries from the forward pass, or None.
    """
    out, lse = results
    q, k, v, grad_out = (aligned(x) for x in (*inputs, grad_out))
    routed, own = packed(selection.routed), None if selection.own is None else packed(selection.own)
    sizes = Sizes.of(q, k, v, routed, selection.block_size)
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    strides, unit = head_strides(q, k, v, grad_out)
    layout = unit, *(token_stride(x) for x in (q, k, v, grad_out))
    key_tile, query_tile, finish, of_delta = backward_constants(
        sizes, layout, is_causal, own is not None, has_large_shared_memory(q.device)
    )
    factor, dtypes = scale / math.log(2), (q.dtype,)
    grad_lse = None if grad_lse is None else packed(grad_lse)
    tiles_per_block = ceil_div(sizes.block_size, key_tile["KEYS"])
    item_rows = _item_rows(sizes, tiles_per_block)
    use_hopper = hopper.supports_backward((q, k, v), grad_out, sizes, is_causal=is_causal)
    with on_device_of(q):
        delta = torch.empty_like(lse)
        launch(
            delta_kernel,
            ceil_div(lse.numel(), DELTA_ROWS),
            (
                *(grad_out, out, grad_lse, delta, *strides[-2:]),
                *(lse.numel(), sizes.q_len, sizes.heads),
            ),
            of_delta | {"HAS_GRAD_LSE": grad_lse is not None},
            dtypes,
        )
        tensors: tuple[Any, ...] = (q, k, v, grad_out, lse, delta)
        call = hopper.BackwardCall((q, k, v, grad_out), lse, delta, own, sizes, is_causal, scale)
        for group, for_keys, for_queries in _passes(sizes, item_rows):
            in_one_kernel = for_keys and for_queries and tiles_per_block == 1
            pairs, first_rows = _sorted_rows(routed, group, sizes, rows)
            query_rows = query_tile["ROWS"] if for_queries and not in_one_kernel else None
            items = items_of_blocks(first_rows, item_rows, query_rows, group, sizes)
            max_pairs = group.max_queries * sizes.count
            max_extra = _max_extra(max_pairs, item_rows) if for_keys else 0
            extra = lse.new_empty(max_extra, sizes.block_size, sizes.dim + sizes.value_dim)
            partial_grads = q.new_empty(max_pairs if for_queries else 0, sizes.dim)
            for piece in group.pieces:
                n_pairs = piece.n_queries * sizes.count
                numbers = (
                    *(*strides, group.first_query, group.first_kv_head, piece.first_block),
                    piece.first_block + piece.n_blocks,
                    (piece.first_query - group.first_query) * sizes.count,
                    *(sizes.kv_heads, sizes.q_len, sizes.kv_len, sizes.n_blocks, factor, scale),
                )
                if for_keys and use_hopper:
                    hopper.key_grads_on_hopper(
                        call,
                        (d_k, d_v, extra),
                        (pairs, first_rows, *items.of_keys, items.first_extra),
                        group,
                        piece,
                        item_rows,
                    )
                elif for_keys:
                    launch(
                        key_grads_kernel,
                        (n_pairs // item_rows + piece.n_blocks) * tiles_per_block,
                        (
                            *(*tensors, own, d_k, d_v, extra, partial_grads),
                            *(pairs, first_rows, *items.of_keys, items.first_extra),
                            *(*numbers, item_rows),
                        ),
                        key_tile | {"WRITES_QUERY_GRADS": in_one_kernel},
                        dtypes,
                    )
                if max_extra:
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
                if items.of_queries is not None and use_hopper:
                    hopper.query_grads_on_hopper(
                        call,
                        partial_grads,
                        (pairs, first_rows, *items.of_queries),
                        group,
                        piece,
                    )
                elif items.of_queries is not None:
                    launch(
                        item_query_grads_kernel,
                        n_pairs // query_tile["ROWS"] + piece.n_blocks if n_pairs else 0,
                        (
                            *(*tensors, partial_grads, pairs, first_rows),
                            *(*items.of_queries, *numbers),
                        ),
                        query_tile,
                        dtypes,
                    )
                if for_queries:
                    launch(
                        finish_query_grads_kernel,
                        piece.n_tiles,
                        (
                            *(*tensors, partial_grads, routed, own, d_q, *strides),
                            *(piece.first_tile, piece.first_query, sizes.heads, sizes.kv_heads),
                            *(sizes.q_len, sizes.kv_len, factor, scale),
                        ),
                        finish,
                        dtypes,
                    )
            del partial_grads, extra  # before the next sort group allocates its buffers
    return d_q, d_k, d_v
