"""Launches of the kernels of attention over a shared selection."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from flexmoba.backends.fused.backward_kernels import sum_extra_kernel
from flexmoba.backends.fused.routing import items_of_blocks, sort_pairs
from flexmoba.backends.fused.schedule import Sizes, SortGroup, rows_of_items
from flexmoba.backends.fused.strides import head_strides, token_stride
from flexmoba.backends.fused.tile_sizes import is_split, padded_dim
from flexmoba.backends.grouped.key_kernels import key_grads_kernel
from flexmoba.backends.grouped.query_kernels import (
    attend_kernel,
    list_blocks_kernel,
    query_grads_kernel,
)
from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.runtime import has_large_shared_memory
from flexmoba.runtime.triton_launch import aligned, launch, on_device_of, packed

_LEAST_ITEM, _ITEMS = 256, 1024  # of `rows_of_items`, whose rows are tokens here


def attend_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Computes `grouped_attention` for a scale that is not negative."""
    q, k, v, selected = aligned(q), aligned(k), aligned(v), packed(selected)
    sizes = Sizes.of(q, k, v, selected, block_size)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    strides, unit = head_strides(q, k, v)
    tile = _constants(sizes, is_causal=is_causal, unit=unit, q=q, k=k, v=v)
    tile |= _forward_tile(sizes, q.device)
    with on_device_of(q):
        lists = _listed_blocks(selected, tile)
        launch(
            attend_kernel,
            lists[1].shape[0],
            (
                *(q, k, v, *lists, out, lse, *strides),
                *(sizes.kv_heads, sizes.q_len, sizes.kv_len, scale / math.log(2)),
            ),
            tile,
            (q.dtype,),
        )
    return out, lse


def attend_backward_on_cuda(
    grads: tuple[Tensor, Tensor | None],
    results: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    selected: Tensor,
    block_size: int,
    scale: float,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v.

    Args:
        grads: The gradients of the output, ``(B, Hq, Lq, Dv)``, and of the log-sum-exp,
            ``(B, Hq, Lq)`` float32, or None for zeros.
        results: The output and the log-sum-exp.
        inputs: Queries ``(B, Hq, Lq, D)``, keys ``(B, Hkv, Lk, D)``, values ``(B, Hkv, Lk, Dv)``.
        selected: Block indices, ``(B, Hkv, Lq, topk)`` int32.
        block_size: Keys in a block.
        scale: Factor on the scores, at least 0.
        is_causal: Whether a query attends only to keys at or before its position.
    """
    q, k, v, grad_out = (aligned(x) for x in (*inputs, grads[0]))
    grad_lse = None if grads[1] is None else packed(grads[1])
    selected, (out, lse) = packed(selected), results
    sizes = Sizes.of(q, k, v, selected, block_size)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides, unit = head_strides(q, k, v, grad_out)
    constants = _constants(sizes, is_causal=is_causal, unit=unit, q=q, k=k, v=v)
    constants["GRAD_STRIDE"] = token_stride(grad_out)
    factor, dtypes = scale / math.log(2), (q.dtype,)
    lengths = sizes.kv_heads, sizes.q_len, sizes.kv_len
    with on_device_of(q):
        delta = torch.empty_like(lse)
        tile = constants | _query_grads_tile(sizes, q.device)
        tile["HAS_GRAD_LSE"] = grad_lse is not None
        lists = _listed_blocks(selected, tile)
        launch(
            query_grads_kernel,
            lists[1].shape[0],
            (
                *(q, k, v, grad_out, out, lse, grad_lse, *lists, d_q, delta),
                *(*strides, *lengths, factor, scale),
            ),
            tile,
            dtypes,
        )
        del lists
        # Route the tokens of each KV head to the blocks that they selected.
        tokens = replace(sizes, heads=sizes.kv_heads)
        n_kv_heads = sizes.batch * sizes.kv_heads
        group = SortGroup(0, n_kv_heads * sizes.q_len, 0, n_kv_heads, [])
        _, (pairs, first_rows) = sort_pairs(selected, group, tokens)
        all_blocks = n_kv_heads * sizes.n_blocks
        item_rows = rows_of_items(pairs.shape[0], all_blocks, _LEAST_ITEM, _ITEMS)
        of_keys, first_extra, _ = items_of_blocks(first_rows, item_rows, None, group, tokens)
        first_item, block_of_item = of_keys
        # A block with several items has less than twice as many items as its tokens fill.
        max_extra = 2 * pairs.shape[0] // item_rows
        extra = lse.new_empty(max_extra, block_size, sizes.dim + sizes.value_dim)
        large = has_large_shared_memory(q.device)
        tile = constants | _key_tile(sizes, large_shared_memory=large)
        tiles_per_block = ceil_div(block_size, tile["KEYS"])
        launch(
            key_grads_kernel,
            block_of_item.shape[0] * tiles_per_block,
            (
                *(q, k, v, grad_out, lse, delta, d_k, d_v, extra, pairs, first_rows),
                *(first_item, block_of_item, first_extra, *strides, all_blocks, *lengths),
                *(sizes.n_blocks, factor, scale, item_rows),
            ),
            tile,
            dtypes,
        )
        if max_extra:
            launch(
                sum_extra_kernel,
                all_blocks * tiles_per_block,
                (
                    *(extra, d_k, d_v, first_item, first_extra, 0, 0, sizes.kv_len),
                    *(sizes.n_blocks, scale),
                ),
                tile,
                dtypes,
            )
    return d_q, d_k, d_v


def _constants(
    sizes: Sizes, *, is_causal: bool, unit: int, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, int]:
    return {
        "IS_CAUSAL": is_causal,
        "GROUP": sizes.group,
        "COUNT": sizes.count,
        "BLOCK_SIZE": sizes.block_size,
        "DIM": sizes.dim,
        "TILE_DIM": max(16, padded_dim(sizes.dim)),
        "VALUE_DIM": sizes.value_dim,
        "TILE_VALUE_DIM": max(16, next_power_of_2(sizes.value_dim)),
        "UNIT": unit,
        "Q_STRIDE": token_stride(q),
        "K_STRIDE": token_stride(k),
        "V_STRIDE": token_stride(v),
    }


def _forward_tile(sizes: Sizes, device: torch.device) -> dict[str, int]:
    """Returns the tile sizes of `attend_kernel`.

    The query heads of a tile fill a matrix product of 64 rows, which the matrix units of an H100
    compute at their highest rate. With three tiles of keys and values in shared memory, two
    programs fit on a multiprocessor of an H100, and two tiles are copied while one is in use. With
    head dims 192/128, two programs fit with two tiles each.
    """
    warp_rows = 8 if _needs_few_keys(sizes, device) else 16
    return _token_tile(sizes, device, rows=64, warp_rows=warp_rows, stages=3)


def _query_grads_tile(sizes: Sizes, device: torch.device) -> dict[str, int]:
    """Returns the tile sizes of `query_grads_kernel`.

    On an H100, tiles of 32 rows take less time than tiles of 64, probably because more programs
    overlap the waits between three products. Head dims above 128 were not timed with 32 rows, but
    with 64 rows and 192 dims, the kernel would spill registers.
    """
    is_wide = _is_wide(sizes)
    rows = 64 if is_wide and not is_split(sizes.dim) else 32
    return _token_tile(sizes, device, rows=rows, warp_rows=8 if is_wide else 16, stages=2)


def _token_tile(
    sizes: Sizes, device: torch.device, *, rows: int, warp_rows: int, stages: int
) -> dict[str, int]:
    """Returns the tile sizes of a kernel that processes a tile of tokens.

    A tile has ``rows`` query heads, padding included, or those of one token if they are more; a
    warp has ``warp_rows`` of them. ``stages`` tiles of keys and values are for head dims up to 128
    and the shared memory of an H100; fewer or smaller tiles fit elsewhere.
    """
    heads = max(8, next_power_of_2(sizes.group))
    tokens = max(1, rows // heads)
    is_wide = _is_wide(sizes)
    is_large = has_large_shared_memory(device)
    if is_wide or not is_large:
        stages = 1 + (is_large or not is_wide)
    return {
        "HEADS": heads,
        "TOKENS": tokens,
        "LIST": tokens * next_power_of_2(sizes.count),
        "KEYS": min(
            32 if _needs_few_keys(sizes, device) else 64,
            max(16, next_power_of_2(sizes.block_size)),
        ),
        "num_warps": min(8, tokens * heads // warp_rows),
        "num_stages": stages,
    }


def _is_wide(sizes: Sizes) -> bool:
    return max(sizes.dim, sizes.value_dim) > 128


def _needs_few_keys(sizes: Sizes, device: torch.device) -> bool:
    """Returns whether only tiles of 32 keys leave room for other programs."""
    fits = is_split(sizes.dim) and sizes.value_dim <= 128 and has_large_shared_memory(device)
    return _is_wide(sizes) and not fits


def _listed_blocks(selected: Tensor, tile: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Returns the list of blocks of every tile of tokens, ``(tiles, LIST)``, and its length."""
    batch, kv_heads, q_len, _ = selected.shape
    tiles = batch * kv_heads * ceil_div(q_len, tile["TOKENS"])
    entries = torch.empty(tiles, tile["LIST"], dtype=torch.int64, device=selected.device)
    lengths = torch.empty(tiles, dtype=torch.int32, device=selected.device)
    options = tile | {"num_warps": 1}
    launch(list_blocks_kernel, tiles, (selected, entries, lengths, q_len), options, ())
    return entries, lengths


def _key_tile(sizes: Sizes, *, large_shared_memory: bool = True) -> dict[str, int]:
    """Returns the tile sizes of `key_grads_kernel`.

    Compiled for an H100, two programs of four warps fit on a multiprocessor, but head dims above
    128 need the registers of eight warps. Without its shared memory, they need smaller tiles.
    """
    is_wide = _is_wide(sizes)
    most = 32 if is_wide and not large_shared_memory else 64
    keys = min(most, max(16, next_power_of_2(sizes.block_size)))
    stages = 2 if large_shared_memory else 1
    return {"ROWS": most, "KEYS": keys, "num_warps": 8 if is_wide else 4, "num_stages": stages}
