"""The attention function that transformers dispatches to."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.attention import flex_moba
from flexmoba.backends import ScoreMod
from flexmoba.cache import MobaCache
from flexmoba.integrations.transformers.cache import MobaLayer, layer_of
from flexmoba.integrations.transformers.packing import POSITIONS, documents_of
from flexmoba.integrations.transformers.settings import CHILD, name_of, settings_of
from flexmoba.runtime import autocast_dtype
from flexmoba.sequence import without_padding

# Arguments of models whose attention is another one; None is no argument.
UNKNOWN = ("sinks", "position_bias", "head_mask", "indices", "block_indices", "cache")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Mixture of Block Attention as transformers calls it (arXiv 2502.13189, Sec. 2.2).

    Args:
        module: The attention module, whose `FlexMoba` or config has block size and topk.
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``; only new ones if the others are in a `FlexMobaCache`.
        value: ``(B, Hkv, S, Dv)``.
        attention_mask: ``(B, S)``, as `padding_mask` makes it: bool, which keys are real, or int32,
            the document of each.
        scaling: Factor on the scores.
        dropout: Must be 0.
        is_causal: Must be True, if given.
        softcap: Scores are ``softcap * tanh(score / softcap)``.
        sliding_window: Must be no less than the context.
        s_aux: ``(Hq,)``, the score of each head's attention sink, a key without a value.
        kwargs: What else the model passes on: ``position_ids``, ``cu_seq_lens_q`` and ``seq_idx``
            tell packed documents apart.

    Returns:
        The output, ``(B, L, Hq, Dv)``, and None for weights.

    Raises:
        ValueError: The layer has no settings, or the mask is none of padding.
        NotImplementedError: The model asks for what `flex_moba` does not have.
    """
    _check(module, attention_mask, dropout, is_causal, kwargs)
    block_size, topk, options = settings_of(module)
    layer = _layer_of(module, key, value)
    # As other attentions have it; rotary embeddings may have left queries and keys in float32.
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    _check_window(module, layer, key.shape[2], sliding_window)
    options = {**options, "scale": scaling}
    options["score_mod"] = None if softcap is None else softcap_of(softcap)
    documents: dict[str, Any] = documents_of(
        attention_mask,
        query.shape[0],
        (query.shape[2], key.shape[2]),
        position_ids=kwargs.get("position_ids", kwargs.get(POSITIONS)),
        **{name: kwargs.get(name) for name in ("cu_seq_lens_q", "seq_idx")},
    )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = None
    elif query.shape[2] > 1 and not documents:
        _check_positions(module, kwargs)
    if documents and (layer is not None or query.shape[2] != key.shape[2]):
        raise NotImplementedError(
            f"{name_of(module)} was given packed documents and {query.shape[2]} queries for "
            f"{key.shape[2]} keys, or a FlexMobaCache; pack without a cache and with "
            "logits_to_keep=0, or give each document a row of its own"
        )

    inputs = query, key, value
    added = attention_mask is not None and key.shape[2] > query.shape[2]
    if layer is not None or (added and not _needs_gradients(*inputs)):
        out, lse = _attend_with_cache(layer, inputs, attention_mask, block_size, topk, options)
    else:
        out, lse = _attend(module, inputs, attention_mask, documents, (block_size, topk), options)
    if s_aux is not None:
        # One more term in the sum of the softmax: keys keep this share of the weight.
        share = torch.sigmoid(lse - s_aux.reshape(-1, 1))
        out = (out * share[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _attend_with_cache(
    layer: MobaLayer | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    real: Tensor | None,
    block_size: int,
    topk: int | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention by the layer of a `FlexMobaCache`, or to padded rows by a cache for this call."""
    for name in ("impl", "kernel_options"):
        if options.get(name, "auto") not in ("auto", None):
            raise NotImplementedError(
                f"{name}={options[name]!r} does not go with a cache; leave it out of "
                "config.flexmoba"
            )
    options = {x: y for x, y in options.items() if x not in ("impl", "kernel_options")}
    attend = _attend_to_rows if layer is None else layer.attend
    return attend(*inputs, real, block_size, topk, options)


def _attend(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    real: Tensor | None,
    documents: dict[str, Any],
    blocks: tuple[int, int | None],
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention by `flex_moba`; ``blocks`` are the block size and topk."""
    query, key, value = inputs
    added = 0 if real is None else key.shape[2] - query.shape[2]
    layout = None
    if real is not None and documents:  # which are of the real tokens alone
        layout = without_padding(real, 1)
        query, key, value = (layout.spread(x) for x in inputs)
    elif real is not None:
        if added and options.get("gate") == "tile":
            raise NotImplementedError(
                'gate="tile" needs the queries of all tokens, and the padded rows of '
                f"{name_of(module)} have {query.shape[2]} queries for {key.shape[2]} keys; use "
                "another gate, or no padding"
            )
        documents = {"key_padding_mask": real}
        query = nn.functional.pad(query, (0, 0, added, 0))
    block_size, topk = blocks
    everything: dict[str, Any] = {**documents, **options}
    result: Any = flex_moba(
        query, key, value, block_size, topk, return_aux=AuxRequest(lse=True), **everything
    )
    out, lse = result[0], result[1].lse[..., None]
    if layout is not None:
        out, lse = layout.collect(out), layout.collect(lse)
    return out[:, :, added:], lse[:, :, added:, 0]


def _layer_of(module: nn.Module, key: Tensor, value: Tensor) -> MobaLayer | None:
    """The layer of a `FlexMobaCache` that keys and values have just come through, if any."""
    layer = layer_of(key)
    if layer is not layer_of(value):
        raise NotImplementedError(
            f"{name_of(module)} changes keys or values between its cache and its attention, which "
            "a FlexMobaCache cannot follow; use a cache of transformers"
        )
    return layer


def _check_window(
    module: nn.Module, layer: MobaLayer | None, keys: int, sliding_window: int | None
) -> None:
    """Refuses a sliding window that is shorter than the context."""
    length: Any = keys
    if layer is not None:  # of a static cache, the room: how many tokens there are is on the device
        length = layer.columns if layer.max_cache_len is None else layer.max_cache_len
    if sliding_window is not None and length > sliding_window:
        raise NotImplementedError(
            f"{name_of(module)} has a sliding window of {sliding_window} tokens, shorter than the "
            f"context of {length}, which flexmoba does not have; use a shorter context, or "
            f"load the model with sliding_window={length} or more"
        )


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def softcap_of(cap: float) -> ScoreMod:
    """A ``score_mod`` that bounds scores by ``cap``; one function for each value."""
    return _softcap(cap) if torch.compiler.is_compiling() else _known_softcap(cap)


def _softcap(cap: float) -> ScoreMod:
    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


_known_softcap = functools.cache(_softcap)


def _attend_to_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    block_size: int,
    topk: int | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """New queries against all keys of padded rows, from another cache: each row on its own."""
    cache = MobaCache(
        *(key.shape[0], key.shape[1], key.shape[3]),
        block_size=block_size,
        value_dim=value.shape[3],
        max_len=key.shape[2],
        dtype=key.dtype,
        device=key.device,
    )
    positions = cache.append(key, value, real)[:, -query.shape[2] :]
    return cache.attend(query, positions, topk, **options)


def _check(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuses what `flex_moba` does not have."""
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name_of(module)} passes {name} to its attention, which flexmoba does not have; "
                'use attn_implementation="sdpa" or "eager"'
            )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"{name_of(module)} was asked for attention weights, which flexmoba never has in one "
            'piece; use output_attentions=False, or attn_implementation="eager"'
        )
    if dropout > 0 and module.training:
        raise NotImplementedError(
            f"{name_of(module)} has attention dropout of {dropout}, which flexmoba does not have; "
            "set it to 0 in the config (attention_dropout, or attn_pdrop)"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(
            f"{name_of(module)} is not causal self-attention, which is all that flexmoba does in "
            'transformers; use attn_implementation="sdpa" for it'
        )
    mask: Any = attention_mask
    kinds = torch.bool, torch.int32
    if mask is not None and (getattr(mask, "dtype", None) not in kinds or len(mask.shape) != 2):
        raise ValueError(
            f"{name_of(module)} was given as its mask a {type(mask).__name__} of shape "
            f"{tuple(mask.shape)}; flexmoba takes a padding mask, (B, S), as the model's "
            "attention_mask, and packed documents as position_ids or cu_seq_lens_q"
        )


def _check_positions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """That documents would have been seen, had there been any: `convert` takes care of it."""
    told = ("position_ids", POSITIONS, "cu_seq_lens_q", "seq_idx")
    if CHILD not in module._modules and not any(name in kwargs for name in told):
        raise NotImplementedError(
            f"{name_of(module)} is not given position_ids by its model, so packed documents could "
            "see each other; call flexmoba.integrations.transformers.attach(model) once"
        )
