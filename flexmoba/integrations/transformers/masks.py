"""The mask function for transformers: its mask describes padding or documents.

The attention itself is causal. Any other mask raises an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from flexmoba.integrations.transformers.packing import may_read

NO_WINDOW = {"full_attention", "linear_attention"}  # entries of config.layer_types


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
    """Returns the mask that `attention` expects: real keys, documents, or None.

    transformers calls it once for each forward pass, before the layers. It reads values from the
    device, except in code that is compiled or captured in a CUDA graph.

    Args:
        batch_size: Rows ``B``.
        q_length: Queries.
        kv_length: Keys that the attention gets: all keys, or only the new ones if a `FlexMobaCache`
            has the others.
        q_offset: Column of the first query. Columns count the tokens of a row, padding included.
        kv_offset: Column of the first key.
        mask_function: The mask of transformers without padding.
        attention_mask: ``(B, q_offset + q_length)`` bool, True for real tokens.
        local_size: Length of a sliding window or chunk in tokens; None for neither.
        use_vmap: Whether the model changes the mask by its own function.
        config: Config of the model.
        device: Device of the mask.

    Returns:
        Real keys, ``(B, kv_length)`` bool, or None if all keys are real. If transformers found
        packed documents by their positions, which it does only without ``attention_mask`` and
        without a cache, the document of each token, ``(B, kv_length)`` int32.

    Raises:
        ValueError: The length of ``attention_mask`` does not fit.
        NotImplementedError: The mask is not causal, or limits the context to a window or chunk, or
            the cache is a static cache of transformers.
    """
    model = f"model type {getattr(config, 'model_type', None)!r}"
    # "and_mask" combines the causal mask with packed documents or a window; see below.
    causal = mask_function is causal_mask_function or mask_function.__name__ == "and_mask"
    if use_vmap or not causal:
        raise NotImplementedError(
            f"{model} asks for a mask other than causal, padding and packed documents, which "
            'flexmoba does not support; use attn_implementation="sdpa"'
        )
    _check_window(model, local_size, q_length, kv_length, q_offset, kv_offset, config)
    if kv_length != q_length and isinstance(q_offset, Tensor):
        raise _static_cache_error(model)
    if isinstance(q_offset, int) and isinstance(kv_offset, int):
        columns = q_offset + q_length
        if kv_offset + kv_length > columns:
            raise _static_cache_error(model)
        if attention_mask is not None and attention_mask.shape[1] != columns:
            raise ValueError(
                f"attention_mask must cover the {q_offset} columns of the cache and the {q_length} "
                f"new ones, {columns} in all, got {attention_mask.shape[1]} ({model}); pass one "
                "value for every token so far"
            )
    if attention_mask is None:
        is_complete = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length > 1
        if mask_function is causal_mask_function or not is_complete:
            return None
        return _document_of_token(mask_function, batch_size, q_length, device)
    real = attention_mask[:, attention_mask.shape[1] - kv_length :]
    if may_read(real) and bool(real.all()):
        return None
    return real


def _document_of_token(
    mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str | None
) -> Tensor | None:
    """Returns the document of each token, ``(B, L)`` int32, or None if a row has one document.

    A document begins at each token that the mask separates from the previous token.
    """
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
    """Raises if a window or chunk is shorter than the context.

    With a static cache, the length of the context is a tensor on the device.
    """
    if set(getattr(config, "layer_types", None) or [None]) <= NO_WINDOW:
        local_size = None  # some models make the mask of a window that no layer uses
    context = kv_offset + kv_length
    is_cut = isinstance(kv_offset, int) and kv_offset > 0 and kv_length != q_length
    # If the context is cut, the cache has dropped the keys before the window.
    is_beyond = is_cut or (local_size is not None and context > local_size)
    if isinstance(is_beyond, Tensor) and not may_read(is_beyond):
        torch._assert_async(
            ~is_beyond,
            f"{model} has a sliding window or chunks of {local_size} tokens, shorter than the "
            "context",
        )
    elif is_beyond:
        has_window = getattr(config, "sliding_window", None) is not None
        name = "sliding_window" if has_window else "attention_chunk_size"
        raise NotImplementedError(
            f"{model} has a sliding window or chunks of {local_size} tokens, shorter than the "
            f"context of {int(context)}, which flexmoba does not support; use a shorter context, "
            f"or load the model with {name}={int(context)} or more"
        )


def _static_cache_error(model: str) -> Exception:
    return NotImplementedError(
        f"{model} was given a static cache of transformers, which does not mark its unwritten "
        "keys; pass past_key_values=FlexMobaCache(max_cache_len=...)"
    )
