"""What a GPU offers to kernels."""

import functools

import torch


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Returns whether a program can use 227 KiB of shared memory, as on an H100.

    On other devices, kernels use at most 99 KiB.
    """
    if device.type != "cuda":  # Triton's interpreter
        return True
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
