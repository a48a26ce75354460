"""Validation of calls through a cache, before anything is added to it."""

import torch
from torch import Tensor


def check_new(name: str, new: Tensor, old: Tensor, length: int | None = None) -> None:
    """That new tokens ``(B, Hkv, n, D)`` fit to those of a cache ``(B, Hkv, capacity, D)``."""
    if length is None and new.ndim == 4:
        length = new.shape[2]
    want = (*old.shape[:2], "n" if length is None else length, old.shape[3])
    if tuple(new.shape) != want:
        raise ValueError(f"{name} must be {want} for this cache, got {tuple(new.shape)}")
    check_like_cache(name, new, old)


def check_like_cache(name: str, new: Tensor, old: Tensor) -> None:
    """That new tokens have the dtype and device of a cache."""
    if (new.dtype, new.device) != (old.dtype, old.device):
        raise ValueError(
            f"{name} must be {old.dtype} on {old.device} like the cache, got {new.dtype} on "
            f"{new.device}"
        )


def check_no_gradients(*tensors: Tensor) -> None:
    """That nothing would be differentiated."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(
            "attention to a cache has no gradients; call it under torch.no_grad(), or without a "
            "cache to train"
        )
