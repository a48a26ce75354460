"""Tensors as the fused kernels read them: aligned rows, and strides as numbers."""

import torch
from torch import Tensor


def aligned(x: Tensor) -> Tensor:
    """Rows without gaps, the first at a multiple of 16 bytes; other strides may be any."""
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def token_stride(x: Tensor) -> int:
    """Elements between two tokens of a head."""
    return x.stride(2) if x.shape[2] > 1 else x.shape[3]


def head_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of batch and heads of each tensor, and the unit that they are counted in.

    If there is a unit of 16 elements, the compiler knows that heads begin at aligned addresses.
    """
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for x in tensors for dim in (0, 1)]
    unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit
