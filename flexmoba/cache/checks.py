"""Validation of calls with a cache, before the call adds tokens to the cache."""

import torch
from torch import Tensor

from flexmoba.runtime import values_readable


def check_new_tokens(name: str, new: Tensor, cached: Tensor, length: int | None = None) -> None:
    """Raises unless new keys or values fit the cache.

    Args:
        name: Name of the argument, for the message.
        new: New keys or values, ``(B, Hkv, n, D)``.
        cached: Keys or values of the cache, ``(B, Hkv, capacity, D)``.
        length: Expected number of new tokens ``n``; None for any.
    """
    if length is None and new.ndim == 4:
        length = new.shape[2]
    expected = (*cached.shape[:2], "n" if length is None else length, cached.shape[3])
    if tuple(new.shape) != expected:
        raise ValueError(
            f"{name} must be {expected} for this cache, got {tuple(new.shape)}; pass a tensor of "
            "this shape, or make the cache for the other shape"
        )
    check_like_cache(name, new, cached)


def check_appended(
    k: Tensor, v: Tensor, mask: Tensor | None, k_cache: Tensor, v_cache: Tensor
) -> None:
    """Raises unless a cache can append these keys and values, with this padding mask or None."""
    check_new_tokens("k", k, k_cache)
    check_new_tokens("v", v, v_cache, k.shape[2])
    check_no_gradients(k, v)
    check_new_padding(mask, k)


def check_kept(length: int | Tensor) -> None:
    """Raises unless ``length``, the number of tokens to keep, is an int or a tensor, at least 0.

    The values of a tensor are checked only on CPU.
    """
    remedy = "pass the number of tokens to keep"
    if isinstance(length, Tensor):
        if values_readable(length) and bool((length < 0).any()):
            raise ValueError(f"length must be at least 0, got {length.tolist()}; {remedy}")
    elif not isinstance(length, int):
        raise TypeError(
            f"length must be an int or a tensor of ints, got {type(length).__name__}; {remedy}"
        )
    elif length < 0:
        raise ValueError(f"length must be at least 0, got {length}; {remedy}")


def check_like_cache(name: str, new: Tensor, cached: Tensor) -> None:
    """Raises unless ``new`` has the dtype and device of the cache."""
    if (new.dtype, new.device) != (cached.dtype, cached.device):
        raise ValueError(
            f"{name} must be {cached.dtype} on {cached.device} like the cache, got {new.dtype} on "
            f"{new.device}; make the cache with the dtype and device of the model"
        )


def check_no_gradients(*tensors: Tensor) -> None:
    """Raises if autograd would record an operation on one of the tensors."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(
            "attention to a cache has no gradients; call it under torch.no_grad(), or train "
            "without a cache"
        )


def check_queries(q: Tensor, positions: Tensor, cached: Tensor) -> None:
    """Raises unless queries and their positions fit the cache.

    Args:
        q: Queries, ``(B, Hq, n, D)``.
        positions: Their positions, ``(B, n)``.
        cached: Keys of the cache, ``(B, Hkv, capacity, D)``.
    """
    batch, heads, n, dim = q.shape
    if (batch, dim) != cached.shape[::3] or (batch, n) != positions.shape:
        raise ValueError(
            f"q must be ({cached.shape[0]}, Hq, n, {cached.shape[3]}) and positions "
            f"({cached.shape[0]}, n) for this cache, got {tuple(q.shape)} and "
            f"{tuple(positions.shape)}; pass the queries and positions of the appended tokens"
        )
    if heads == 0 or heads % cached.shape[1] != 0:
        raise ValueError(
            f"the number of query heads must be a positive multiple of the cache's "
            f"{cached.shape[1]} KV heads, got {heads}; make the cache with the kv_heads of the "
            "model"
        )
    check_like_cache("q", q, cached)


def check_new_padding(mask: Tensor | None, k: Tensor) -> None:
    """Raises unless a padding mask is bool with one value for each new token."""
    if mask is not None and (mask.shape != k.shape[::2] or mask.dtype != torch.bool):
        raise ValueError(
            f"key_padding_mask must be bool of shape {tuple(k.shape[::2])}, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}; pass one value for every new token"
        )
