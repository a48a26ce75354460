"""What transformers asks of an attention implementation's mask: here, padding or documents.

Everything causal is up to the attention. What this mask cannot say is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from flexmoba.integrations.transformers.packing import may_read

NO_WINDOW = {"full_attention", "linear_attention"}  # among the layer_types of a config


def padding_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor | None:
    """Which of the attention's keys are real, ``(B, kv_length)`` bool; None for all of them.

    Without ``attention_mask`` or a cache, transformers tells packed documents apart by their
    positions. If there are any, the result is the document of each token, ``(B, kv_length)`` int32.

    Called once a forward pass, outside of layers. There it waits for the device, unless traced by a
    compiler or captured in a CUDA graph.

    Args:
        batch_size: Rows ``B``.
        q_length: Queries.
        kv_length: Keys that the attention is given: all of them, or the queries' own if the rest
            is in a `FlexMobaCache`.
        q_offset: Column of the first query.
        kv_offset: Column of the first key.
        mask_function: What transformers wants masked beside padding.
        attention_mask: ``(B, q_offset + q_length)`` bool, real columns.
        local_size: Length of a sliding window or chunk.
        use_vmap: Whether the model changes the mask by a function of its own.
        config: The model's.
        device: Where the mask is to be.

    Raises:
        ValueError: The mask does not fit.
        NotImplementedError: A mask that is not causal with padding.
    """
    model = f"model type {getattr(config, 'model_type', None)!r}"
    # "and_mask": packed documents or a window, see below.
    causal = mask_function is causal_mask_function or mask_function.__name__ == "and_mask"
    if use_vmap or not causal:
        raise NotImplementedError(
            f"{model} asks for a mask other than causal attention, with padding, of packed "
            'documents, which flexmoba does not have; use attn_implementation="sdpa"'
        )
    _check_window(model, local_size, q_length, kv_length, q_offset, kv_offset, config)
    if kv_length != q_length and isinstance(q_offset, Tensor):
        raise _static(model)
    if isinstance(q_offset, int) and isinstance(kv_offset, int):
        seen = q_offset + q_length
        if kv_offset + kv_length > seen:
            raise _static(model)
        if attention_mask is not None and attention_mask.shape[1] != seen:
            raise ValueError(
                f"attention_mask must cover the {q_offset} columns of the cache and the {q_length} "
                f"new ones, {seen} in all, got {attention_mask.shape[1]} ({model})"
            )
    if attention_mask is None:
        first = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length > 1
        if mask_function is causal_mask_function or not first:
            return None
        return _documents(mask_function, batch_size, q_length, device)
    real = attention_mask[:, attention_mask.shape[1] - kv_length :]
    if may_read(real) and bool(real.all()):
        return None
    return real


def _documents(
    mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str | None
) -> Tensor | None:
    """The document of each token: a new one begins where a token does not see the one before."""
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(1, length, device=device)[None]
    starts = ~mask_function(rows, torch.zeros_like(rows), tokens, tokens - 1)
    if may_read(starts) and not bool(starts.any()):
        return None
    ids = torch.nn.functional.pad(starts.cumsum(1, dtype=torch.int32), (1, 0))
    return ids.expand(batch, -1)


def _check_window(
    model: str,
    local_size: int | None,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    config: Any,
) -> None:
    """That no window is shorter than what is seen, which for a static cache is on the device."""
    if set(getattr(config, "layer_types", None) or [None]) <= NO_WINDOW:
        local_size = None  # a mask that models make whether or not a layer asks for it
    seen = kv_offset + kv_length
    cut = isinstance(kv_offset, int) and kv_offset > 0 and kv_length != q_length
    beyond = cut or (local_size is not None and seen > local_size)  # cut: a cache that forgot keys
    if isinstance(beyond, Tensor) and not may_read(beyond):
        torch._assert_async(
            ~beyond, f"{model} has a sliding window or chunks of {local_size} tokens, and more came"
        )
    elif beyond:
        window = getattr(config, "sliding_window", None) is not None
        name = "sliding_window" if window else "attention_chunk_size"
        raise NotImplementedError(
            f"{model} has a sliding window or chunks of {local_size} tokens, shorter than the "
            f"context of {int(seen)}, which flexmoba does not have; use a shorter context, or "
            f"load the model with {name}={int(seen)} or more"
        )


def _static(model: str) -> Exception:
    return NotImplementedError(
        f"{model} was given a static cache of transformers, whose unwritten keys flexmoba would "
        "take for keys; pass past_key_values=FlexMobaCache(max_cache_len=...)"
    )
