"""Launches the warp-specialised attention of routed blocks, where it supports the inputs.

Gluon is an experimental part of Triton: this module and the kernels of Hopper alone use it, with
versions of Triton that compiled them.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexmoba.backends.fused.routing import tiles_of_blocks
from flexmoba.backends.fused.schedule import Piece, Sizes, SortGroup
from flexmoba.backends.fused.strides import head_strides, token_stride
from flexmoba.runtime.triton_launch import launch

# Measured at 512, where the kernel is slower than `attend_kernel`, and at 4096, where it is faster.
least_block = 4096

_KEYS, _ROWS = 128, 128  # in a tile
_HEAD_DIMS = (64, 128)
# From this block size on, an enforced order of softmax and product is faster.
_LEAST_ORDERED_BLOCK = 1024


class Tiles(NamedTuple):
    """The tiles of rows of a sort group, as `tiles_of_blocks` returns them."""

    first_of_block: Tensor
    block: Tensor
    begin: Tensor
    end: Tensor


class _Place(NamedTuple):
    """Where the heads of keys or values are in a matrix with a token in each row."""

    n_rows: int
    n_columns: int
    row_of_batch: int
    row_of_head: int
    column_of_head: int


def supports(k: Tensor, v: Tensor, sizes: Sizes, *, is_causal: bool) -> bool:
    """Returns whether the kernel supports a call.

    It attends to full blocks of full tiles of keys, whose rows the copy engine can address.
    """
    return (
        sizes.block_size >= least_block
        and sizes.count > 0
        and sizes.block_size % _KEYS == 0
        and sizes.dim == sizes.value_dim
        and sizes.dim in _HEAD_DIMS
        and (is_causal or sizes.kv_len % sizes.block_size == 0)
        and _is_hopper(k.device)
        and _place(k) is not None
        and _place(v) is not None
    )


def tiles_of(first_rows: Tensor, group: SortGroup, sizes: Sizes) -> Tiles:
    """Divides the rows of each block into tiles."""
    return Tiles(*tiles_of_blocks(first_rows, _ROWS, group, sizes))


def attend_on_hopper(
    inputs: tuple[Tensor, Tensor, Tensor],
    partial: tuple[Tensor, Tensor],
    pairs: Tensor,
    tiles: Tiles,
    group: SortGroup,
    piece: Piece,
    sizes: Sizes,
    factor: float,
) -> None:
    """Computes `attend_kernel` for a piece.

    Args:
        inputs: q, k and v, for which `supports` is True.
        partial: The partial outputs ``(rows, D)`` and log-sum-exps ``(rows,)`` to write.
        pairs: ``(rows,)`` int32, the pair of each row.
        tiles: The tiles of the sort group.
        group: The sort group.
        piece: The piece.
        sizes: The sizes of the call.
        factor: The scale in base 2.
    """
    q, k, v = inputs
    (q_stride_b, q_stride_h), unit = head_strides(q)
    k_place, v_place = _place(k), _place(v)
    assert k_place is not None
    assert v_place is not None
    from flexmoba.backends.fused.hopper_kernels import hopper_attend_kernel

    launch(
        hopper_attend_kernel,
        torch.cuda.get_device_properties(q.device).multi_processor_count,
        (
            *(q, _descriptor(k, k_place), _descriptor(v, v_place), *partial, pairs, *tiles),
            *(q_stride_b, q_stride_h, *k_place[2:], *v_place[2:]),
            *(piece.first_block, piece.first_block + piece.n_blocks),
            *(group.first_query, group.first_kv_head),
            (piece.first_query - group.first_query) * sizes.count,
            *(sizes.kv_heads, sizes.q_len, sizes.n_blocks, factor),
        ),
        _constants(sizes) | {"Q_STRIDE": token_stride(q), "UNIT": unit},
        (q.dtype,),
    )


@functools.lru_cache(maxsize=1024)
def _constants(sizes: Sizes) -> dict[str, int]:
    """Returns the constants of the kernel but for strides."""
    # A thread of the products needs about 200 registers, and one of the copies few.
    return {
        "GROUP": sizes.group,
        "COUNT": sizes.count,
        "BLOCK_SIZE": sizes.block_size,
        "ROWS": _ROWS,
        "KEYS": _KEYS,
        "ORDERED": sizes.block_size >= _LEAST_ORDERED_BLOCK,
        "DIM": sizes.dim,
        "STAGES": 2,
        "REGISTERS": 216,
        "COPY_REGISTERS": 56,
        "num_warps": 4,
        "maxnreg": 168,
    }


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    has_gluon = importlib.util.find_spec("triton.experimental.gluon") is not None
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and has_gluon and (3, 6) <= version <= (3, 7)


def _place(x: Tensor) -> _Place | None:
    """Returns the place of each head of ``x (B, H, L, D)``, or None if the layout has no matrix."""
    batch, heads, length, dim = x.shape
    stride_b, stride_h = (x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))
    token = token_stride(x)
    if token % 8 != 0 or stride_b % token != 0:
        return None
    row_b = stride_b // token
    n_rows = (batch - 1) * row_b + length
    if stride_h % token == 0:  # heads one after the other
        row_h = stride_h // token
        return _Place(n_rows + (heads - 1) * row_h, dim, row_b, row_h, 0)
    if (heads - 1) * stride_h + dim <= token:  # heads side by side
        return _Place(n_rows, (heads - 1) * stride_h + dim, row_b, 0, stride_h)
    return None


def _descriptor(x: Tensor, place: _Place) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dim = x.shape[3]
    return TensorDescriptor(
        x,
        [place.n_rows, place.n_columns],
        [token_stride(x), 1],
        [_KEYS, dim],
        NVMMASharedLayout(128, 16, 2),
    )
