"""The alignment and the strides that the fused kernels require of tensors."""

import torch
from torch import Tensor


def aligned(x: Tensor) -> Tensor:
    """Returns ``x (B, H, L, D)``, or a copy of it if its memory does not suit the kernels.

    They require rows without gaps, of which the first begins at a multiple of 16 bytes. The other
    strides are arbitrary.
    """
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def token_stride(x: Tensor) -> int:
    """Returns the number of elements from one token of a head to the next."""
    return x.stride(2) if x.shape[2] > 1 else x.shape[3]


def head_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Returns the strides of batch and heads of each tensor, and the unit that they are counted in.

    The unit is 16 elements if all strides are multiples of it. Then Triton knows that heads begin
    at aligned addresses.
    """
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for x in tensors for dim in (0, 1)]
    unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
    return [stride // unit for stride in strides], unit
