"""The strides that the fused kernels require of tensors."""

from torch import Tensor


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
