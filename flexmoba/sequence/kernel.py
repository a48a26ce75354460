"""Rows of a tensor to other places, as one Triton kernel: each row is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.runtime.triton_launch import kernel, launch

_TILE = 4096  # elements that a program moves
_UNIT = 8  # elements; where strides are multiples of it, loads are as wide as can be


def move_on_cuda(x: Tensor, source: Tensor) -> Tensor:
    """Row ``source[b, i]`` of ``x (B, H, N, D)`` as row ``i`` for every head; zeros if it is -1."""
    batch, heads, _, dim = x.shape
    if x.stride(-1) != 1 or x.data_ptr() % 16 != 0:
        x = x.clone(memory_format=torch.contiguous_format)
    unit = _UNIT if all(stride % _UNIT == 0 for stride in x.stride()[:3]) else 1
    length = source.shape[1]
    out = x.new_empty(batch, heads, length, dim)
    tile_d = triton.next_power_of_2(dim)
    constants = {
        "DIM": dim,
        "TILE_D": tile_d,
        "ROWS": max(1, _TILE // tile_d),
        "UNIT": unit,
        "num_warps": 4,
    }
    tiles = triton.cdiv(length, constants["ROWS"])
    strides = (stride // unit for stride in x.stride()[:3])
    with torch.cuda.device_of(x):
        launch(
            _move_kernel,
            batch * heads * tiles,
            (x, source.contiguous(), out, heads, length, tiles, *strides),
            constants,
            (x.dtype,),
        )
    return out


@kernel
def _move_kernel(
    x_ptr, source_ptr, out_ptr, heads: tl.int32, length: tl.int32, tiles: tl.int32,
    batch_stride: tl.int64, head_stride: tl.int64, row_stride: tl.int64,
    DIM: tl.constexpr, TILE_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // tiles  # counted over the batch
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, TILE_D)
    there = (row < length)[:, None] & (dim < DIM)[None, :]
    batch = head // heads
    source = tl.load(source_ptr + batch.to(tl.int64) * length + row, mask=row < length, other=-1)
    x_ptr += (batch * batch_stride + head % heads * head_stride) * UNIT
    at = tl.maximum(source, 0).to(tl.int64) * row_stride * UNIT
    x = tl.load(x_ptr + at[:, None] + dim[None, :], mask=there & (source >= 0)[:, None], other=0.0)
    at = (head.to(tl.int64) * length + row) * DIM
    tl.store(out_ptr + at[:, None] + dim[None, :], x, mask=there)
