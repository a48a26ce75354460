"""Layers of a sliding window or of chunks beside global ones: they keep the model's own attention.

`settings.local_layers` says which they are.
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
    """What transformers dispatches to: `attention`, or the model's own in local layers."""
    attend = local_attention if is_local(module) else attention
    return attend(module, query, key, value, attention_mask, **kwargs)


def layer_mask(*, config: Any = None, local_size: int | None = None, **kwargs: Any) -> Any:
    """What transformers asks for a mask, once for each type of layers; for `layer_attention`."""
    if local_size is not None and local_layers(config):
        return local_mask(config=config, local_size=local_size, **kwargs)
    return padding_mask(config=config, local_size=local_size, **kwargs)


def local_mask(
    *, config: Any, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Any:
    """The mask of local layers, as the model's own attention wants it."""
    make = AttentionMaskInterface._global_mapping[local_attention_of(config)]
    return make(
        config=config,
        q_length=q_length,
        kv_length=kv_length,
        # So that no mask for fewer queries than keys means that a layer dropped some, see below.
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        **kwargs,
    )


def local_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, but packed documents are told apart as in global layers.

    transformers does so by ``position_ids`` alone, and with a cache or a mask not at all.

    Args:
        module: The attention module.
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        mask: As `local_mask` makes it.
        kwargs: What else the model passes on.

    Returns:
        The output, ``(B, L, Hq, Dv)``, and weights, if the implementation has them.

    Raises:
        NotImplementedError: The cache or the implementation does not serve such a layer.
    """
    name = local_attention_of(module.config)
    if layer_of(key) is not None:
        raise NotImplementedError(
            f"{name_of(module)} keeps its sliding window or chunks, of which this FlexMobaCache "
            "does not know; pass past_key_values=FlexMobaCache(config=model.config)"
        )
    if name == "sdpa" and kwargs.get("s_aux") is not None:  # it would drop them
        raise NotImplementedError(
            f'{name_of(module)} has attention sinks, which local_attention="sdpa" does not have; '
            'set config.flexmoba["local_attention"] to "eager" or "flex_attention"'
        )
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys > 1:  # else global layers refuse documents
        mask = _apart(module, query, mask, kwargs)
    elif mask is None and queries > 1:  # the last queries alone, as in Gemma 4
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries)[None, None]
    # What the file that the model is written in dispatches to.
    names = inspect.unwrap(type(module).forward).__globals__
    attend = (
        names["eager_attention_forward"]
        if name == "eager"
        else names["ALL_ATTENTION_FUNCTIONS"][name]
    )
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, mask, **kwargs)
    return result


def _apart(module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
    """The mask, or another in whose place packed documents do not see each other."""
    bounds = kwargs.get("cu_seq_lens_q")
    real = None if bounds is not None else _real(mask)
    documents = documents_of(
        real,
        query.shape[0],
        (query.shape[2],) * 2,
        position_ids=kwargs.get("position_ids", kwargs.get(POSITIONS)),
        cu_seq_lens_q=bounds,
        seq_idx=kwargs.get("seq_idx"),
    )
    if not documents:
        return mask
    known: tuple[Any, ...] | None = getattr(mask, "flexmoba_apart", None)
    if known is None:
        made = _document_mask(module, query, mask, real, documents)
        known = (made,) if made is not mask else ()
        if mask is not None and not torch.compiler.is_compiling():
            mask.flexmoba_apart = known  # for the other layers, as long as the pass lasts
    return known[0] if known else mask


def _document_mask(
    module: nn.Module, query: Tensor, mask: Any, real: Tensor | None, documents: dict[str, Tensor]
) -> Any:
    config: Any = module.config
    rows, _, n, _ = query.shape
    place = torch.arange(n, device=query.device)
    ids = documents.get("document_ids")
    if ids is None:
        ids = torch.searchsorted(documents["cu_seqlens"][1:].contiguous(), place, right=True)[None]
    if real is not None:  # documents are of the real tokens alone
        nth = real.cumsum(1)
        ids = torch.where(nth > 0, ids.expand(rows, -1).gather(1, (nth - 1).clamp(min=0)), -1)
    begins = torch.nn.functional.pad(ids.diff(dim=1) != 0, (1, 0))
    if mask is not None and may_read(begins) and not bool((begins[:, 1:] & _sees(mask, 1)).any()):
        return mask  # transformers looked for documents, too
    ids = ids.expand(rows, -1)
    positions = (place - torch.where(begins, place, 0).cummax(1).values).expand(rows, -1)
    # Chunks are counted from the beginning of each document.
    if config.layer_types[module.layer_idx] == "chunked_attention":
        no_padding = torch.zeros(rows, dtype=torch.int64, device=query.device)
        window = chunked_causal_mask_function(config.attention_chunk_size, no_padding)
    else:
        window = sliding_window_causal_mask_function(config.sliding_window)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen: Tensor = window(b, h, positions[b, i], positions[b, j])
        return seen & (ids[b, i] == ids[b, j])

    return local_mask(
        config=config,
        batch_size=rows,
        q_length=n,
        kv_length=n,
        mask_function=sees,
        attention_mask=real,
        allow_is_causal_skip=False,
        dtype=query.dtype,
        device=query.device,
    )


def _real(mask: Any) -> Tensor | None:
    """Which tokens are no padding, ``(B, L)``; None for all of them."""
    if mask is None:
        return None
    if not hasattr(mask, "flexmoba_real"):
        real = _sees(mask, 0)
        if not may_read(real):
            return real
        # Kept for the other layers, so that `documents_of` knows it again.
        mask.flexmoba_real = None if bool(real.all()) else real
    known: Tensor | None = mask.flexmoba_real
    return known


def _sees(mask: Any, back: int) -> Tensor:
    """Whether each token sees itself, or the one that many tokens before, ``(B, L - back)``."""
    if isinstance(mask, BlockMask):
        rows, _, n, _ = mask.shape
        row, place = (torch.arange(x, device=mask.kv_indices.device) for x in (rows, n))
        seen: Tensor = mask.mask_mod(row[:, None], row.new_zeros(()), place, place - back)
        return seen.expand(rows, n)[:, back:]
    seen = mask.diagonal(-back, 2, 3)[:, 0]
    return seen if seen.dtype == torch.bool else seen == 0
