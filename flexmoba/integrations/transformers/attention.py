"""The attention function of converted layers, to which transformers dispatches."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest

from flexmoba.attention import flex_moba
from flexmoba.backends import ScoreMod
from flexmoba.cache import MobaCache
from flexmoba.integrations.entry import CHILD
from flexmoba.integrations.transformers.batching import is_paged, paged_attention
from flexmoba.integrations.transformers.cache import MobaLayer, layer_of
from flexmoba.integrations.transformers.packing import POSITIONS, documents_of
from flexmoba.integrations.transformers.ranks import documents_over_ranks, shards_of
from flexmoba.integrations.transformers.settings import name_of, settings_of
from flexmoba.runtime import autocast_dtype
from flexmoba.sequence import without_padding

# Arguments of models with another attention. Their value None is the same as no argument.
UNSUPPORTED = ("sinks", "position_bias", "head_mask", "indices", "block_indices", "cache")


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
    """Computes Mixture of Block Attention, as transformers calls it (arXiv 2502.13189, Sec. 2.2).

    Args:
        module: The attention module, whose `FlexMoba` or config has the settings.
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``; with a `FlexMobaCache`, only the new keys.
        value: ``(B, Hkv, S, Dv)``.
        attention_mask: The result of `padding_mask`, ``(B, S)``: real keys (bool), or the document
            of each key (int32).
        scaling: Factor on the attention scores; ``1 / sqrt(D)`` by default.
        dropout: Must be 0 in training.
        is_causal: Must be True or None.
        softcap: Bound of the scores, which become ``softcap * tanh(score / softcap)``; None for no
            bound.
        sliding_window: Length of the window in tokens, at least the length of the context; None for
            no window.
        s_aux: Score of the attention sink of each head, ``(Hq,)``. A sink is a key without a value.
        kwargs: Other arguments of the model. ``position_ids``, ``cu_seq_lens_q`` and ``seq_idx``
            determine packed documents.

    Returns:
        The output, ``(B, L, Hq, Dv)``, and None in place of weights.

    Raises:
        ValueError: The layer has no settings, or the mask is not a padding mask.
        NotImplementedError: The model needs a feature that `flex_moba` does not support.
    """
    paged = is_paged(kwargs)
    unsupported = {**kwargs, "cache": None} if paged else kwargs
    _check(module, attention_mask, dropout, is_causal, unsupported)
    if paged:
        _check_paged(module, softcap, sliding_window)
        out, lse = paged_attention(module, query, key, value, scaling, kwargs)
        return _with_sinks(out, lse, s_aux), None
    block_size, topk, options = settings_of(module)
    layer = _layer_of(module, key, value)
    # Other attentions cast under autocast, too. Rotary embeddings may return float32.
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    _check_window(module, layer, key.shape[2], sliding_window)
    options = {**options, "scale": scaling}
    options["score_mod"] = None if softcap is None else softcap_of(softcap)
    lengths, shards = (query.shape[2], key.shape[2]), shards_of(module)
    documents: dict[str, Any]
    if shards is not None:
        documents = documents_over_ranks(module, shards, lengths, attention_mask, kwargs)
    else:
        documents = documents_of(
            attention_mask,
            query.shape[0],
            lengths,
            position_ids=kwargs.get("position_ids", kwargs.get(POSITIONS)),
            **{name: kwargs.get(name) for name in ("cu_seq_lens_q", "seq_idx")},
        )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = None
    elif query.shape[2] > 1 and not documents:
        _check_positions(module, kwargs)
    if documents and (layer is not None or query.shape[2] != key.shape[2]):
        raise NotImplementedError(
            f"{name_of(module)} was given packed documents with {query.shape[2]} queries for "
            f"{key.shape[2]} keys, or with a FlexMobaCache; pack documents without a cache and "
            "with logits_to_keep=0, or put each document into its own row"
        )

    inputs = query, key, value
    is_continuation = attention_mask is not None and key.shape[2] > query.shape[2]
    if layer is not None or (is_continuation and not _needs_gradients(*inputs)):
        out, lse = _attend_with_cache(layer, inputs, attention_mask, block_size, topk, options)
    else:
        blocks, aux = (block_size, topk), AuxRequest(lse=s_aux is not None)
        out, lse = _attend(module, inputs, attention_mask, documents, blocks, aux, options)
    return _with_sinks(out, lse, s_aux), None


def _with_sinks(out: Tensor, lse: Tensor | None, s_aux: Tensor | None) -> Tensor:
    """Returns the output as transformers expects it, ``(B, L, Hq, Dv)``, with attention sinks."""
    if s_aux is not None:
        assert lse is not None
        # The sink adds one term to the sum of the softmax. The keys keep this share of the weight.
        share = torch.sigmoid(lse - s_aux.reshape(-1, 1))
        out = (out * share[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous()


def _check_paged(module: nn.Module, softcap: float | None, sliding_window: int | None) -> None:
    """Raises if a layer has an option that continuous batching does not support."""
    for name, value in (("softcap", softcap), ("sliding_window", sliding_window)):
        if value is not None:
            raise NotImplementedError(
                f"{name_of(module)} has {name}={value}, which flexmoba does not support in "
                "continuous batching; use generate"
            )


def _attend_with_cache(
    layer: MobaLayer | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    real: Tensor | None,
    block_size: int,
    topk: int | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attends by the layer of a `FlexMobaCache`, or else by a temporary cache of padded rows."""
    for name in ("impl", "kernel_options"):
        if options.get(name, "auto") not in ("auto", None):
            raise NotImplementedError(
                f"a cache does not support {name}={options[name]!r}; remove it from config.flexmoba"
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
    aux: AuxRequest,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attends by `flex_moba`; ``blocks`` holds the block size and topk."""
    query, key, value = inputs
    earlier = 0 if real is None else key.shape[2] - query.shape[2]
    layout = None
    if real is not None and documents:  # `documents` describes only the real tokens
        layout = without_padding(real, 1)
        query, key, value = (layout.spread(x) for x in inputs)
    elif real is not None:
        if earlier and options.get("gate") == "tile":
            raise NotImplementedError(
                'gate="tile" needs the queries of all tokens, but the padded rows of '
                f"{name_of(module)} have {query.shape[2]} queries for {key.shape[2]} keys; use "
                "another gate, or no padding"
            )
        documents = {"key_padding_mask": real}
        query = nn.functional.pad(query, (0, 0, earlier, 0))
    block_size, topk = blocks
    keywords: dict[str, Any] = {**documents, **options}
    shards = shards_of(module)
    attend: Any = flex_moba if shards is None else shards.attend
    out, results = attend(query, key, value, block_size, topk, return_aux=aux, **keywords)
    lse = results.lse
    if layout is not None:
        out, lse = layout.collect_results(out, lse)
    return out[:, :, earlier:], None if lse is None else lse[:, :, earlier:]


def _layer_of(module: nn.Module, key: Tensor, value: Tensor) -> MobaLayer | None:
    """Returns the layer of the `FlexMobaCache` that returned the keys and values, or None."""
    layer = layer_of(key)
    if layer is not layer_of(value):
        raise NotImplementedError(
            f"{name_of(module)} changes keys or values between its cache and its attention, which "
            "a FlexMobaCache does not support; use a cache of transformers"
        )
    return layer


def _check_window(
    module: nn.Module, layer: MobaLayer | None, keys: int, sliding_window: int | None
) -> None:
    """Raises if a sliding window is shorter than the context."""
    length: Any = keys
    if layer is not None:  # for a static cache, the capacity: its length is a tensor on the device
        length = layer.columns if layer.max_cache_len is None else layer.max_cache_len
    if sliding_window is not None and length > sliding_window:
        raise NotImplementedError(
            f"{name_of(module)} has a sliding window of {sliding_window} tokens, shorter than the "
            f"context of {length}, which flexmoba does not support; use a shorter context, or "
            f"load the model with sliding_window={length} or more"
        )


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def softcap_of(cap: float) -> ScoreMod:
    """Returns a ``score_mod`` that bounds scores by ``cap``, one function for each value."""
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
    """Attends from new queries to all keys of padded rows, which another cache returned."""
    cache = MobaCache(
        *(key.shape[0], key.shape[1], key.shape[3]),
        block_size=block_size,
        gate_block_size=options.get("gate_block_size"),
        value_dim=value.shape[3],
        max_len=key.shape[2],
        dtype=key.dtype,
        device=key.device,
    )
    options = {name: x for name, x in options.items() if name != "gate_block_size"}
    positions = cache.append(key, value, real)[:, -query.shape[2] :]
    return cache.attend(query, positions, topk, **options)


def _check(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    """Raises if the model needs a feature that `flex_moba` does not support."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name_of(module)} passes {name} to its attention, which flexmoba does not "
                'support; use attn_implementation="sdpa" or "eager"'
            )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"{name_of(module)} was asked for attention weights, which flexmoba does not compute; "
            'use output_attentions=False, or attn_implementation="eager"'
        )
    if dropout > 0 and module.training:
        raise NotImplementedError(
            f"{name_of(module)} has attention dropout of {dropout}, which flexmoba does not "
            "support; set it to 0 in the config (attention_dropout, or attn_pdrop)"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(
            f"{name_of(module)} is not causal self-attention, the only attention that flexmoba "
            'supports in transformers; use attn_implementation="sdpa" for it'
        )
    mask: Any = attention_mask
    dtypes = torch.bool, torch.int32
    if mask is not None and (getattr(mask, "dtype", None) not in dtypes or len(mask.shape) != 2):
        raise ValueError(
            f"{name_of(module)} was given a {type(mask).__name__} of shape {tuple(mask.shape)} as "
            "its mask; pass a padding mask (B, S) as the model's attention_mask, and packed "
            "documents as position_ids or cu_seq_lens_q"
        )


def _check_positions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises if the module cannot find packed documents. After `convert` or `attach`, it can."""
    names = ("position_ids", POSITIONS, "cu_seq_lens_q", "seq_idx")
    if CHILD not in module._modules and not any(name in kwargs for name in names):
        raise NotImplementedError(
            f"{name_of(module)} gets no position_ids from its model, so packed documents could "
            "attend to each other; call flexmoba.integrations.transformers.attach(model) once"
        )
