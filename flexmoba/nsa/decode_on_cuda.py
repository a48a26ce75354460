"""The launches of the Triton kernels of a decoding step."""

import math
from typing import Any

import torch
from torch import Tensor

from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.gate.kernel import MAX_COUNT, MAX_HEAD_DIM
from flexmoba.nsa.decode_kernels import (
    attend_kernel,
    compressed_kernel,
    merge_kernel,
    select_kernel,
)
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors
from flexmoba.runtime.triton_launch import launch, packed

_MAX_GROUP = 64
_PROGRAMS, _MOST_PARTS = 1024, 64  # of `compressed_kernel`
_LEAST_SPLIT, _MOST_SPLITS = 128, 16  # blocks of a split, and splits, of `select_kernel`
_TILE_PLACES = 128  # compressed blocks of a tile of `select_kernel`
_ROWS_OF_WARP = 16  # rows of a warp of `select_kernel`; one warp needs no barriers
_CHUNK, _KEYS = 128, 64
_STAGES = 2  # copies of keys and values to shared memory


def supports(q: Tensor, v: Tensor, group: int, sizes: NsaSizes) -> bool:
    """Returns whether the kernels support these queries, values and sizes."""
    few_dims = max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM
    return few_dims and group <= _MAX_GROUP and sizes.scored <= int(MAX_COUNT)


def attend_step_on_cuda(
    q: Tensor,
    gates: Tensor,
    positions: Tensor,
    cache: BranchTensors,
    sizes: NsaSizes,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `attend_step` by Triton kernels."""
    q, gates, positions = packed(q), packed(gates), packed(positions)
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len, value_dim = cache.v.shape[1:]
    n_compressed, n_blocks = cache.k_cmp.shape[2] - 1, kv_len // sizes.block_size - 1
    units, rows = batch * kv_heads * q_len, batch * heads * q_len
    constants = _constants(q, gates, cache, sizes, window)
    parts, splits, slots = (constants[name] for name in ("PARTS", "SPLITS", "SLOTS"))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    scores = empty(units, heads // kv_heads, n_compressed)
    partials = empty(rows, parts, value_dim), empty(rows, parts)
    best = empty(units, splits, slots, dtype=torch.int64)
    out, lse = q.new_empty(batch, heads, q_len, value_dim), empty(batch, heads, q_len, 3)
    factor, dtypes = scale / math.log(2), (q.dtype,)
    with torch.cuda.device_of(q):
        launch(
            compressed_kernel,
            units * constants["CMP_PARTS"],
            (
                *(q, cache.k_cmp, cache.v_cmp, positions, scores, *partials),
                *(kv_heads, n_compressed, factor),
            ),
            constants,
            dtypes,
        )
        if sizes.scored > 0:
            launch(
                select_kernel,
                units * splits,
                (scores, partials[1], positions, best, kv_heads, n_compressed, n_blocks),
                constants | {"num_warps": constants["ROWS"] // _ROWS_OF_WARP},
                dtypes,
            )
        launch(
            attend_kernel,
            units * (parts - constants["CMP_PARTS"]),
            (
                *(q, cache.k, cache.v, cache.k_win, cache.v_win, positions, best, *partials),
                *(kv_heads, n_blocks, factor),
            ),
            constants,
            dtypes,
        )
        launch(
            merge_kernel,
            rows,
            (*partials, gates, positions, out, lse, kv_heads, n_blocks),
            constants,
            dtypes,
        )
    return out, lse


def _constants(
    q: Tensor, gates: Tensor, cache: BranchTensors, sizes: NsaSizes, window: int
) -> dict[str, Any]:
    """Returns the constants of all kernels."""
    (batch, heads, q_len, dim), kv_heads = q.shape, cache.k.shape[1]
    value_dim, block_size = cache.v.shape[3], sizes.block_size
    n_compressed, n_blocks = cache.k_cmp.shape[2] - 1, cache.k.shape[2] // block_size - 1
    is_large = q.element_size() > 2 or max(dim, value_dim) > 128
    keys = _KEYS // 2 if is_large else _KEYS
    cmp_parts = next_power_of_2(max(1, ceil_div(_PROGRAMS, batch * kv_heads * q_len)))
    cmp_parts = min(cmp_parts, _MOST_PARTS, max(1, ceil_div(n_compressed, keys)))
    chunks, window_parts = ceil_div(block_size, _CHUNK), ceil_div(window, _CHUNK)
    parts = cmp_parts + sizes.topk * chunks + window_parts
    split = max(_LEAST_SPLIT, next_power_of_2(ceil_div(n_blocks, _MOST_SPLITS)))
    splits = ceil_div(n_blocks, split)
    room = next_power_of_2(block_size // sizes.cmp_stride)
    return {
        "GROUP": heads // kv_heads,
        "ROWS": max(16, next_power_of_2(heads // kv_heads)),
        "Q_LEN": q_len,
        "GATE_HEADS": gates.shape[1],
        "STRIDE": sizes.cmp_stride,
        "IN_BLOCK": block_size // sizes.cmp_stride,
        "IN_COMPRESSED": sizes.cmp_block // sizes.cmp_stride,
        "SINKS": sizes.sink_blocks,
        "LOCALS": sizes.local_blocks,
        "COUNT": sizes.scored,
        "SLOTS": next_power_of_2(max(1, sizes.scored)),
        "SPLIT": split,
        "SPLITS": splits,
        "ALL_SPLITS": next_power_of_2(splits),
        "TILE_BLOCKS": max(4, _TILE_PLACES // room),
        "ROOM": room,
        "BLOCK_SIZE": block_size,
        "WINDOW": window,
        "RING": cache.k_win.shape[2] - 1,
        "CHUNK": _CHUNK,
        "CHUNKS": chunks,
        "COLUMNS": sizes.topk,
        "CMP_PARTS": cmp_parts,
        "ALL_CMP_PARTS": next_power_of_2(cmp_parts),
        "PARTS": parts,
        "ALL_PARTS": next_power_of_2(parts),
        "SOME_PARTS": min(32, next_power_of_2(parts)),
        "KEYS": keys,
        "DIM": dim,
        "TILE_D": max(16, next_power_of_2(dim)),
        "VALUE_DIM": value_dim,
        "TILE_VALUE_D": max(16, next_power_of_2(value_dim)),
        "num_warps": 4,
        "num_stages": _STAGES,
    }
