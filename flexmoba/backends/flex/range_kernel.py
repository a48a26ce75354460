"""The lists of a range mask by one Triton kernel, instead of some fifty operations of PyTorch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoba.blocks import TILE, ceil_div
from flexmoba.runtime.triton_launch import kernel, launch, on_device_of, packed

_COLUMNS = 128  # entries of a list that a program computes at a time


def range_lists_on_cuda(
    first_key: Tensor | None, end_key: Tensor, kv_len: int, *, transposed: bool
) -> list[Tensor]:
    """Returns count and entries of the partial and the full lists, or of their transposed ones.

    Args:
        first_key: ``(B, Lq)`` int32, the first key that each query sees, or None for key 0.
        end_key: ``(Lq,)`` int32, the end of the keys that each query sees.
        kv_len: Number of keys.
        transposed: Whether to list the tiles of each stretch, not the stretches of each tile.
    """
    q_len, batch = end_key.shape[0], 1 if first_key is None else first_key.shape[0]
    sizes = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)
    rows, columns = reversed(sizes) if transposed else sizes
    shapes = ((batch, 1, rows), (batch, 1, rows, columns)) * 2
    lists = [torch.empty(x, dtype=torch.int32, device=end_key.device) for x in shapes]
    end_key = packed(end_key)
    constants = {
        "TRANSPOSED": transposed,
        "HAS_FIRST": first_key is not None,
        "TILE": TILE,
        "COLUMNS": _COLUMNS,
        "num_warps": 1,
    }
    first_key = end_key if first_key is None else packed(first_key)
    with on_device_of(end_key):
        launch(
            _range_lists_kernel,
            batch * rows,
            (end_key, first_key, *lists, q_len, kv_len),
            constants,
            (),
        )
    return lists


@triton.jit
def _listed(
    end_ptr, first_ptr, row, column, q_len, kv_len,
    TRANSPOSED: tl.constexpr, HAS_FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Returns whether a row lists columns as partial and as full ones."""
    row = tl.zeros_like(column) + row
    tile, stretch = row, column
    if TRANSPOSED:
        tile, stretch = column, row
    first_row, begin = tile * TILE, stretch * TILE
    exists = (first_row < q_len) & (begin < kv_len)
    last_row = tl.minimum(first_row + TILE, q_len) - 1
    # Short tiles and stretches at the ends are partial, so that the kernel checks their bounds.
    full = (first_row + TILE <= q_len) & (begin + TILE <= kv_len)
    first_row = tl.minimum(first_row, q_len - 1)
    end = tl.load(end_ptr + last_row)
    visited = begin < end
    full = full & (begin + TILE <= tl.load(end_ptr + first_row))
    if HAS_FIRST:
        lowest = tl.load(first_ptr + first_row)
        visited = visited & (begin + TILE > lowest) & (lowest < end)
        full = full & (begin >= tl.load(first_ptr + last_row))
    return exists & visited & (full == 0), exists & full


@triton.jit
def _store_entries(index_ptr, listed, column, n_columns, n_before, n_listed):
    """Stores listed columns in order, and after the ``n_listed`` ones the others in order."""
    listed_before = n_before + tl.cumsum(listed.to(tl.int32), 0) - listed.to(tl.int32)
    place = tl.where(listed, listed_before, n_listed + column - listed_before)
    tl.store(index_ptr + place, column, mask=column < n_columns)


@kernel
def _range_lists_kernel(
    end_ptr, first_ptr, partial_count_ptr, partial_ptr, full_count_ptr, full_ptr,
    q_len: tl.int32, kv_len: tl.int32,
    TRANSPOSED: tl.constexpr, HAS_FIRST: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the partial and the full list of one tile or, transposed, of one stretch."""
    n_rows, n_columns = tl.cdiv(q_len, TILE), tl.cdiv(kv_len, TILE)
    if TRANSPOSED:
        n_rows, n_columns = n_columns, n_rows
    row = tl.program_id(0) % n_rows
    first_ptr += (tl.program_id(0) // n_rows).to(tl.int64) * q_len
    offset = tl.program_id(0).to(tl.int64) * n_columns
    n_partial = 0
    n_full = 0
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        partial, full = _listed(
            end_ptr, first_ptr, row, column, q_len, kv_len, TRANSPOSED, HAS_FIRST, TILE
        )
        n_partial += tl.sum(partial.to(tl.int32), 0)
        n_full += tl.sum(full.to(tl.int32), 0)
    tl.store(partial_count_ptr + tl.program_id(0), n_partial)
    tl.store(full_count_ptr + tl.program_id(0), n_full)
    partial_before = 0
    full_before = 0
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        partial, full = _listed(
            end_ptr, first_ptr, row, column, q_len, kv_len, TRANSPOSED, HAS_FIRST, TILE
        )
        _store_entries(partial_ptr + offset, partial, column, n_columns, partial_before, n_partial)
        _store_entries(full_ptr + offset, full, column, n_columns, full_before, n_full)
        partial_before += tl.sum(partial.to(tl.int32), 0)
        full_before += tl.sum(full.to(tl.int32), 0)
