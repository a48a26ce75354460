"""Routing, attention and merge by a few Triton kernels, forward and backward.

The plan of the FlexAttention way with less to move. Queries are gathered inside the kernels; own
blocks are attended where the parts are merged; the backward pass recomputes the weights from the
final log-sum-exp, so only inputs, output, log-sum-exp and the selection are saved.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flexmoba.checks import no_second_derivatives
from flexmoba.pieces import QUERY_TILE, Call, Shape, cut
from flexmoba.score_mod import ScoreMod

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128

# Rows of a block that one program of the backward pass takes: so many times the average of all
# blocks that few need a second one, but a block that most queries chose has its work shared out.
_ITEM_FACTOR, _LEAST_ITEM = 4, 1024


def why_not_fused(
    q: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None,
    score_mod: ScoreMod | None = None,
    *,
    uneven: bool = False,
) -> str | None:
    """Why the fused kernels cannot take inputs that compiled ones can; None if they can."""
    if torch.version.hip:
        return "has tiles for NVIDIA GPUs alone"
    if q.dtype not in DTYPES:
        return f"needs float16 or bfloat16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"needs head dims of at most {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"
    if kernel_options:
        return f"does not call FlexAttention, to which kernel_options={dict(kernel_options)} belong"
    if uneven:
        return "takes no documents or padding with is_causal=False"
    return None if score_mod is None else "takes no score_mod"


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its routed blocks and, if causal, its own.

    Args:
        q: ``(B, Hq, Lq, D)``, float16 or bfloat16, on CUDA.
        k: ``(B, Hkv, Lk, D)``.
        v: ``(B, Hkv, Lk, Dv)``.
        routed: ``(B, Hq, Lq, T)`` int32, block indices without duplicates in a row; -1 for none.
            If causal, all of them before the query's own block.
        own: ``(B, Hq, Lq)`` bool, which queries attend to their own block; None for all of them.
        block_size: Keys in a block.
        scale: Factor on the scores.
        is_causal: Whether queries attend to their own blocks, causally, beside the routed ones.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32.
    """
    if scale < 0:  # the kernels keep the maximum of scores before they are scaled
        q, scale = -q, -scale
    out, lse = _attend(q, k, v, routed, own, block_size, scale, is_causal)
    return out, lse


# Opaque to compilers: inside torch.compile and outside it is the same.
@torch.library.custom_op("flexmoba::attend_fused", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    from flexmoba.fused_kernels import attend_kernel, finish_kernel
    from flexmoba.launch import launch, packed

    q, k, v = (_aligned(x) for x in (q, k, v))
    routed, own = packed(routed), None if own is None else packed(own)
    shape = Shape.of(q, k, v, routed, block_size)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    strides, unit = _strides(q, k, v)
    layout = unit, *(_token_stride(x) for x in (q, k, v))
    tile, finish = _forward_constants(
        shape, layout, is_causal, own is not None, _is_roomy(q.device)
    )
    factor = scale / math.log(2)
    with torch.cuda.device_of(q):
        for call in cut(shape):
            if shape.count:
                bins, pairs = _sort_pairs(routed, call, shape)
                first_rows = _first_rows(bins, call, shape)
            # After the sort, so that its own buffers are free again.
            rows = call.most_queries * shape.count
            parts, part_lse = q.new_empty(rows, shape.value_dim), lse.new_empty(rows)
            for piece in call.pieces:
                if shape.count:
                    first_row = (piece.first_query - call.first_query) * shape.count
                    n_rows = piece.n_queries * shape.count
                    launch(
                        attend_kernel,
                        -(-n_rows // tile["SHARE"]),
                        (
                            *(q, k, v, parts, part_lse, pairs, bins, first_rows, *strides),
                            *(first_row, first_row + n_rows, call.first_query, call.first_kv_head),
                            *(first_row, shape.kv_heads, shape.q_len, shape.kv_len),
                            *(shape.n_blocks, factor),
                        ),
                        tile,
                        (q.dtype, bins.dtype),
                    )
                launch(
                    finish_kernel,
                    piece.n_tiles,
                    (
                        *(q, k, v, parts, part_lse, routed, own, out, lse, *strides),
                        *(piece.first_tile, piece.first_query, shape.heads, shape.kv_heads),
                        *(shape.q_len, shape.kv_len, factor),
                    ),
                    finish,
                    (q.dtype,),
                )
            del parts, part_lse  # before the next call makes its own
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flexmoba::attend_fused_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from flexmoba.fused_kernels import (
        delta_kernel,
        finish_query_grads_kernel,
        item_query_grads_kernel,
        key_grads_kernel,
        sum_extra_kernel,
    )
    from flexmoba.launch import launch, packed

    q, k, v, grad_out = (_aligned(x) for x in (q, k, v, grad_out))
    routed, own = packed(routed), None if own is None else packed(own)
    shape = Shape.of(q, k, v, routed, block_size)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides, unit = _strides(q, k, v, grad_out)
    layout = unit, *(_token_stride(x) for x in (q, k, v, grad_out))
    key_tile, query_tile, finish, of_delta = _backward_constants(
        shape, layout, is_causal, own is not None, _is_roomy(q.device)
    )
    factor, dtypes = scale / math.log(2), (q.dtype,)
    tiles_per_block = -(-block_size // key_tile["KEYS"])
    with torch.cuda.device_of(q):
        delta = torch.empty_like(lse)
        launch(
            delta_kernel,
            -(-lse.numel() // _DELTA_ROWS),
            (
                *(grad_out, out, packed(grad_lse), delta, *strides[-2:]),
                *(lse.numel(), shape.q_len, shape.heads),
            ),
            of_delta,
            dtypes,
        )
        tensors: tuple[Any, ...] = (q, k, v, grad_out, lse, delta)
        for call in cut(shape, whole_kv_heads=True):
            bins, pairs = _sort_pairs(routed, call, shape)
            first_rows = _first_rows(bins, call, shape)
            per_block = pairs.shape[0] // (call.n_kv_heads * shape.n_blocks)
            item = max(_LEAST_ITEM, _ITEM_FACTOR * per_block)
            first_item, first_extra, first_query_item = _first_items(
                first_rows, item, query_tile["ROWS"], call, shape
            )
            items = first_item, _list_items(first_item, item, call, shape)
            # A block of several items has less than twice as many as its rows fill.
            most_extra = 2 * call.most_queries * shape.count // item
            extra = lse.new_empty(most_extra, block_size, shape.dim + shape.value_dim)
            parts = q.new_empty(call.most_queries * shape.count, shape.dim)
            if tiles_per_block > 1:
                of_query_item = _list_items(first_query_item, query_tile["ROWS"], call, shape)
                query_items = first_query_item, of_query_item
            for piece in call.pieces:
                n_pairs = piece.n_queries * shape.count
                numbers = (
                    *(*strides, call.first_query, call.first_kv_head, piece.first_block),
                    piece.first_block + piece.n_blocks,
                    (piece.first_query - call.first_query) * shape.count,
                    *(shape.kv_heads, shape.q_len, shape.kv_len, shape.n_blocks, factor, scale),
                )
                launch(
                    key_grads_kernel,
                    (n_pairs // item + piece.n_blocks) * tiles_per_block,
                    (
                        *(*tensors, own, d_k, d_v, extra, parts, pairs, first_rows, *items),
                        *(first_extra, *numbers, item),
                    ),
                    key_tile,
                    dtypes,
                )
                if most_extra:
                    launch(
                        sum_extra_kernel,
                        piece.n_blocks * tiles_per_block,
                        (
                            *(extra, d_k, d_v, first_item, first_extra, piece.first_block),
                            *(call.first_kv_head, shape.kv_len, shape.n_blocks, scale),
                        ),
                        key_tile,
                        dtypes,
                    )
                if tiles_per_block > 1:
                    launch(
                        item_query_grads_kernel,
                        n_pairs // query_tile["ROWS"] + piece.n_blocks if n_pairs else 0,
                        (*tensors, parts, pairs, first_rows, *query_items, *numbers),
                        query_tile,
                        dtypes,
                    )
                launch(
                    finish_query_grads_kernel,
                    piece.n_tiles,
                    (
                        *(*tensors, parts, routed, own, d_q, *strides),
                        *(piece.first_tile, piece.first_query, shape.heads, shape.kv_heads),
                        *(shape.q_len, shape.kv_len, factor, scale),
                    ),
                    finish,
                    dtypes,
                )
            del parts, extra  # before the next call makes its own
    return d_q, d_k, d_v


@_attend_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.numbers = inputs[5:]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *(None for _ in range(5)))


_attend.register_autograd(_differentiate, setup_context=_save)
_attend_backward.register_autograd(no_second_derivatives)


# ---- Routing ------------------------------------------------------------------------------------


def _sort_pairs(routed: Tensor, call: Call, shape: Shape) -> tuple[Tensor, Tensor]:
    """The bin and the pair of every row.

    The sort is stable: the rows of a bin keep the order of their queries.
    """
    from flexmoba.fused_kernels import bin_kernel
    from flexmoba.launch import launch

    n_pairs = call.n_queries * shape.count
    # A radix sort of two bytes is twice as fast as one of four.
    dtype = torch.int16 if call.n_kv_heads * (shape.n_blocks + 1) < 2**15 else torch.int32
    bins = routed.new_empty(n_pairs, dtype=dtype)
    launch(
        bin_kernel,
        -(-n_pairs // _BIN_ROWS),
        (
            *(routed, bins, call.first_query * shape.count, n_pairs, call.first_query),
            *(shape.group * shape.q_len, shape.n_blocks),
        ),
        {"COUNT": shape.count, "ROWS": _BIN_ROWS},
        (dtype,),
    )
    bins, pairs = torch.sort(bins, stable=True)
    return bins, pairs.int()


def _first_rows(bins: Tensor, call: Call, shape: Shape) -> Tensor:
    """The first row of each bin, ``(bins + 1,)`` int32; the last is the number of rows."""
    n_bins = call.n_kv_heads * (shape.n_blocks + 1)
    index = torch.arange(n_bins + 1, dtype=bins.dtype, device=bins.device)
    return torch.searchsorted(bins, index, out_int32=True)


def _first_items(
    first_rows: Tensor, item_rows: int, query_item_rows: int, call: Call, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts the rows of each block into items; see `fused_kernels.first_items_kernel`."""
    from flexmoba.fused_kernels import first_items_kernel
    from flexmoba.launch import launch

    n_blocks = call.n_kv_heads * shape.n_blocks
    first_item, first_extra, first_query_item = (
        first_rows.new_empty(n_blocks + 1) for _ in range(3)
    )
    launch(
        first_items_kernel,
        1,
        (
            *(first_rows, first_item, first_extra, first_query_item),
            *(n_blocks, shape.n_blocks, item_rows),
        ),
        {"ROWS": query_item_rows, "TILE": 1024},
        (),
    )
    return first_item, first_extra, first_query_item


def _list_items(first_item: Tensor, item_rows: int, call: Call, shape: Shape) -> Tensor:
    """The block of each item. How many there are is not known here, but as many suffice."""
    from flexmoba.fused_kernels import list_items_kernel
    from flexmoba.launch import launch

    n_blocks = call.n_kv_heads * shape.n_blocks
    most = call.n_queries * shape.count // item_rows + n_blocks
    block_of_item = first_item.new_empty(most)
    launch(list_items_kernel, n_blocks, (first_item, block_of_item), {"TILE": 128}, ())
    return block_of_item


# ---- What the kernels are compiled for ----------------------------------------------------------

_BIN_ROWS, _DELTA_ROWS = 1024, 64


@functools.lru_cache(maxsize=1024)
def _forward_constants(
    shape: Shape, layout: tuple[int, ...], is_causal: bool, has_own: bool, roomy: bool
) -> list[dict[str, int]]:
    constants = _constants(shape, layout, is_causal, has_own)
    return [constants | tile for tile in _forward_tiles(shape, is_causal, roomy)]


@functools.lru_cache(maxsize=1024)
def _backward_constants(
    shape: Shape, layout: tuple[int, ...], is_causal: bool, has_own: bool, roomy: bool
) -> list[dict[str, int]]:
    constants = _constants(shape, layout, is_causal, has_own)
    tiles = [constants | tile for tile in _backward_tiles(shape, is_causal, roomy)]
    return [*tiles, constants | {"ROWS": _DELTA_ROWS}]


def _constants(
    shape: Shape, layout: tuple[int, ...], is_causal: bool, has_own: bool
) -> dict[str, int]:
    names = ("UNIT", "Q_STRIDE", "K_STRIDE", "V_STRIDE", "GRAD_STRIDE")
    return {
        "IS_CAUSAL": is_causal,
        "HAS_OWN": has_own,
        "GROUP": shape.group,
        "COUNT": shape.count,
        "BLOCK_SIZE": shape.block_size,
        "DIM": shape.dim,
        "TILE_DIM": _next_power_of_2(shape.dim),
        "VALUE_DIM": shape.value_dim,
        "TILE_VALUE_DIM": _next_power_of_2(shape.value_dim),
        **dict(zip(names, layout, strict=False)),  # no gradients in the forward pass
    }


def _token_stride(x: Tensor) -> int:
    return x.stride(2) if x.shape[2] > 1 else x.shape[3]


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of batch and heads of each tensor, and the unit that they are counted in.

    If there is a unit of 16 elements, the compiler knows that heads begin at aligned addresses.
    """
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for x in tensors for dim in (0, 1)]
    unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


def _forward_tiles(shape: Shape, is_causal: bool, roomy: bool) -> Iterator[dict[str, int]]:
    """Tile sizes of `attend_kernel` and `finish_kernel`, measured on one NVIDIA H200."""
    some_keys = min(64, max(16, _next_power_of_2(shape.block_size)))
    if shape.block_size <= 128:
        keys = max(16, _next_power_of_2(shape.block_size))
        attend = {"SHARE": 1024, "ROWS": 64, "KEYS": keys, "num_warps": 4, "num_stages": 1}
    elif shape.block_size <= 1024 or not roomy:
        stages = 3 if roomy else 2
        attend = {"SHARE": 128, "ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": stages}
    else:
        attend = {"SHARE": 256, "ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
    yield attend | {"RAGGED": _is_ragged(shape, attend["KEYS"], is_causal)}
    stages = (2 if shape.block_size <= 128 else 3) if roomy else 1
    yield {"ROWS": QUERY_TILE, "KEYS": some_keys, "num_warps": 4, "num_stages": stages}


def _backward_tiles(shape: Shape, is_causal: bool, roomy: bool) -> Iterator[dict[str, int]]:
    """Of `key_grads_kernel`, `item_query_grads_kernel` and `finish_query_grads_kernel`."""
    some_keys = min(64, max(16, _next_power_of_2(shape.block_size)))
    if shape.block_size <= 128 and roomy:
        keys = max(16, _next_power_of_2(shape.block_size))
        key = {"ROWS": 64, "KEYS": keys, "num_warps": 8, "num_stages": 4}
    else:
        stages = 2 if roomy else 1
        key = {"ROWS": 64, "KEYS": some_keys, "num_warps": 4, "num_stages": stages}
    yield key | {"RAGGED": _is_ragged(shape, key["KEYS"], is_causal)}
    if roomy:
        query = {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}
    else:
        query = {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 1}
    yield query | {"RAGGED": _is_ragged(shape, query["KEYS"], is_causal)}
    stages = 2 if roomy else 1
    yield {"ROWS": QUERY_TILE, "KEYS": some_keys, "num_warps": 4, "num_stages": stages}


def _is_ragged(shape: Shape, keys: int, is_causal: bool) -> bool:
    """Whether a routed block may end within a tile of keys; if causal, it is not the last one."""
    return shape.block_size % keys != 0 or (not is_causal and shape.kv_len % shape.block_size != 0)


@functools.cache
def _is_roomy(device: torch.device) -> bool:
    """Whether programs have the shared memory of an H100, 227 KiB."""
    if device.type != "cuda":  # Triton's interpreter
        return True
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _aligned(x: Tensor) -> Tensor:
    """Rows without gaps, the first at a multiple of 16 bytes; other strides may be any."""
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
