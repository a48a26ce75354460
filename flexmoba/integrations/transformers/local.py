"""Local layers, with a sliding window or chunks beside global layers: they keep their attention.

`settings.local_layers` returns the local layers of a model.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from flexmoba.integrations.transformers.attention import attention
from flexmoba.integrations.transformers.cache import layer_of
from flexmoba.integrations.transformers.masks import padding_mask
from flexmoba.integrations.transformers.packing import POSITIONS, documents_of, may_read
from flexmoba.integrations.transformers.settings import (
    is_local,
    local_attention_of,
    local_layers,
    name_of,
)


def layer_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attends for transformers: by `attention`, or by the model's own attention in local layers."""
    attend = local_attention if is_local(module) else attention
    return attend(module, query, key, value, attention_mask, **kwargs)


def layer_mask(*, config: Any = None, local_size: int | None = None, **kwargs: Any) -> Any:
    """Returns the mask for `layer_attention`; called once for each type of layers."""
    if local_size is not None and local_layers(config):
        return local_mask(config=config, local_size=local_size, **kwargs)
    return padding_mask(config=config, local_size=local_size, **kwargs)


def local_mask(
    *, config: Any, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Any:
    """Returns the mask of local layers, in the form that the model's own attention expects."""
    make = AttentionMaskInterface._global_mapping[local_attention_of(config)]
    return make(
        config=config,
        q_length=q_length,
        kv_length=kv_length,
        # With this condition, None for fewer queries than keys means that a layer dropped queries,
        # in `local_attention`.
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        **kwargs,
    )


def local_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attends by the model's own attention, with packed documents separated as in global layers.

    transformers separates documents only by ``position_ids``, and not with a cache or a mask.

    Args:
        module: The attention module.
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        mask: The result of `local_mask`.
        kwargs: Other arguments of the model.

    Returns:
        The output, ``(B, L, Hq, Dv)``, and the weights, or None if the model's attention does not
        return them.

    Raises:
        NotImplementedError: The cache or the attention does not support a local layer.
    """
    name = local_attention_of(module.config)
    if layer_of(key) is not None:
        raise NotImplementedError(
            f"{name_of(module)} keeps its sliding window or chunks, which a FlexMobaCache without "
            "config does not support; pass past_key_values=FlexMobaCache(config=model.config)"
        )
    if name == "sdpa" and kwargs.get("s_aux") is not None:  # sdpa would ignore the sinks
        raise NotImplementedError(
            f'{name_of(module)} has attention sinks, which local_attention="sdpa" does not '
            'support; set config.flexmoba["local_attention"] to "eager" or "flex_attention"'
        )
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys > 1:  # otherwise, documents raise an error in global layers
        mask = _with_documents(module, query, mask, kwargs)
    elif mask is None and queries > 1:  # the layer dropped all but the last queries, as in Gemma 4
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries)[None, None]
    # The functions to which the source file of the model dispatches.
    names = inspect.unwrap(type(module).forward).__globals__
    attend = (
        names["eager_attention_forward"]
        if name == "eager"
        else names["ALL_ATTENTION_FUNCTIONS"][name]
    )
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, mask, **kwargs)
    return result


def _with_documents(module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
    """Returns the mask, or another mask that separates packed documents."""
    boundaries = kwargs.get("cu_seq_lens_q")
    real = None if boundaries is not None else _real_tokens(mask)
    documents = documents_of(
        real,
        query.shape[0],
        (query.shape[2],) * 2,
        position_ids=kwargs.get("position_ids", kwargs.get(POSITIONS)),
        cu_seq_lens_q=boundaries,
        seq_idx=kwargs.get("seq_idx"),
    )
    if not documents:
        return mask
    known: tuple[Any, ...] | None = getattr(mask, "flexmoba_document_mask", None)
    if known is None:
        document_mask = _document_mask(module, query, mask, real, documents)
        known = (document_mask,) if document_mask is not mask else ()
        if mask is not None and not torch.compiler.is_compiling():
            mask.flexmoba_document_mask = known  # for the other layers of this forward pass
    return known[0] if known else mask


def _document_mask(
    module: nn.Module, query: Tensor, mask: Any, real: Tensor | None, documents: dict[str, Tensor]
) -> Any:
    config: Any = module.config
    rows, _, n, _ = query.shape
    column = torch.arange(n, device=query.device)
    ids = documents.get("document_ids")
    if ids is None:
        ids = torch.searchsorted(documents["cu_seqlens"][1:].contiguous(), column, right=True)[None]
    if real is not None:  # `documents` describes only the real tokens
        nth = real.cumsum(1)
        ids = torch.where(nth > 0, ids.expand(rows, -1).gather(1, (nth - 1).clamp(min=0)), -1)
    starts = torch.nn.functional.pad(ids.diff(dim=1) != 0, (1, 0))
    if (
        mask is not None
        and may_read(starts)
        and not bool((starts[:, 1:] & _is_visible(mask, 1)).any())
    ):
        return mask  # transformers has already separated the documents
    ids = ids.expand(rows, -1)
    positions = (column - torch.where(starts, column, 0).cummax(1).values).expand(rows, -1)
    # Chunks begin anew in every document.
    if config.layer_types[module.layer_idx] == "chunked_attention":
        no_padding = torch.zeros(rows, dtype=torch.int64, device=query.device)
        window = chunked_causal_mask_function(config.attention_chunk_size, no_padding)
    else:
        window = sliding_window_causal_mask_function(config.sliding_window)

    def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        in_window: Tensor = window(b, h, positions[b, i], positions[b, j])
        return in_window & (ids[b, i] == ids[b, j])

    return local_mask(
        config=config,
        batch_size=rows,
        q_length=n,
        kv_length=n,
        mask_function=is_visible,
        attention_mask=real,
        allow_is_causal_skip=False,
        dtype=query.dtype,
        device=query.device,
    )


def _real_tokens(mask: Any) -> Tensor | None:
    """Returns the tokens that are not padding, ``(B, L)`` bool, or None if all tokens are real."""
    if mask is None:
        return None
    if not hasattr(mask, "flexmoba_real"):
        real = _is_visible(mask, 0)
        if not may_read(real):
            return real
        # Stored for the other layers, since `documents_of` recognizes the same tensor.
        mask.flexmoba_real = None if bool(real.all()) else real
    known: Tensor | None = mask.flexmoba_real
    return known


def _is_visible(mask: Any, back: int) -> Tensor:
    """Returns whether tokens attend to the token ``back`` before, ``(B, L - back)`` bool."""
    if isinstance(mask, BlockMask):
        rows, _, n, _ = mask.shape
        row, column = (torch.arange(x, device=mask.kv_indices.device) for x in (rows, n))
        visible: Tensor = mask.mask_mod(row[:, None], row.new_zeros(()), column, column - back)
        return visible.expand(rows, n)[:, back:]
    visible = mask.diagonal(-back, 2, 3)[:, 0]
    return visible if visible.dtype == torch.bool else visible == 0
