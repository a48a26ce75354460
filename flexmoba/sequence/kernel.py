"""Copies rows by index in one Triton kernel that reads and writes each row once."""

import torch
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import ceil_div, next_power_of_2
from flexmoba.runtime.triton_launch import kernel, launch

_TILE = 4096  # elements that a program copies
_UNIT = 8  # elements; loads have full width if all strides are multiples of it


def move_on_cuda(x: Tensor, source: Tensor) -> Tensor:
    """Copies row ``source[b, i]`` of every head to row ``i``, or zeros if the source is -1.

    Args:
        x: ``(B, H, N, D)``.
        source: ``(B, M)`` int32, the row of ``x`` for each row of the result; -1 for none.

    Returns:
        ``(B, H, M, D)`` in the dtype of ``x``.
    """
    batch, heads, _, dim = x.shape
    if x.stride(-1) != 1 or x.data_ptr() % 16 != 0:
        x = x.clone(memory_format=torch.contiguous_format)
    unit = _UNIT if all(stride % _UNIT == 0 for stride in x.stride()[:3]) else 1
    length = source.shape[1]
    out = x.new_empty(batch, heads, length, dim)
    tile_d = next_power_of_2(dim)
    constants = {
        "DIM": dim,
        "TILE_D": tile_d,
        "ROWS": max(1, _TILE // tile_d),
        "UNIT": unit,
        "num_warps": 4,
    }
    tiles = ceil_div(length, constants["ROWS"])
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
    head = tl.program_id(0) // tiles  # over all rows of the batch
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, TILE_D)
    valid = (row < length)[:, None] & (dim < DIM)[None, :]
    batch = head // heads
    source = tl.load(source_ptr + batch.to(tl.int64) * length + row, mask=row < length, other=-1)
    x_ptr += (batch * batch_stride + head % heads * head_stride) * UNIT
    offset = tl.maximum(source, 0).to(tl.int64) * row_stride * UNIT
    x = tl.load(
        x_ptr + offset[:, None] + dim[None, :], mask=valid & (source >= 0)[:, None], other=0.0
    )
    offset = (head.to(tl.int64) * length + row) * DIM
    tl.store(out_ptr + offset[:, None] + dim[None, :], x, mask=valid)
