"""Settings of a converted model in vLLM, and the reasons why vLLM cannot serve one.

Every check runs at start-up, while vLLM constructs the layers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm.config import get_current_vllm_config

from flexmoba.integrations.entry import (
    CHILD,
    SERVED,
    check_served,
    layer_arguments,
    mean_keys_by_layer,
    mean_keys_of,
)


class LayerSettings(NamedTuple):
    """Settings of one layer.

    Attributes:
        topk: Blocks that each query attends to, its own block included; None for full attention.
        options: Keyword arguments of `flexmoba.paged.attend_paged`.
        mean_keys: Mean keys in a page.
    """

    topk: int | None
    options: Mapping[str, Any]
    mean_keys: int


def entry_of(vllm_config: Any) -> Mapping[str, Any] | None:
    """Returns ``config.flexmoba`` of the (text) model, or None if it was not converted."""
    model = vllm_config.model_config
    entry: Mapping[str, Any] | None = model and getattr(model.hf_text_config, CHILD, None)
    return entry


def settings_of(entry: Mapping[str, Any], layer: int) -> LayerSettings:
    """Returns the settings of a layer in evaluation mode."""
    given = layer_arguments(entry, layer)
    topk = given["topk"] if given["eval_topk"] == "same" else given["eval_topk"]
    options = {name: given[name] for name in SERVED if name in given}
    return LayerSettings(topk, options, mean_keys_of(given, given["block_size"]))


def most_mean_keys() -> int:
    """Returns the mean keys in a page of the layer with the most sub-blocks."""
    vllm_config = get_current_vllm_config()
    entry = entry_of(vllm_config)
    assert entry is not None
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    return max(mean_keys_by_layer(entry, layers))


def check_selected(name: str, is_ours: bool, selected: Any) -> None:
    """Raises unless vLLM selects this backend for a layer that the backend supports.

    Args:
        name: Name of the selected backend.
        is_ours: Whether it is this backend.
        selected: The `AttentionSelectorConfig` of the layer.

    Raises:
        ValueError: It is another backend, or the backend does not support the layer.
        NotImplementedError: Pages do not support an option of the model.
    """
    vllm_config = get_current_vllm_config()
    entry = entry_of(vllm_config)
    if entry is None:
        raise ValueError(
            "the config of the model has no flexmoba settings; convert the model by "
            "flexmoba.integrations.transformers.convert, or omit --attention-backend CUSTOM"
        )
    if not is_ours:
        raise ValueError(
            f"the config of the model has flexmoba settings, but the attention backend is {name}; "
            "pass --attention-backend CUSTOM (with VLLM_PLUGINS=flexmoba if another plugin has "
            'registered CUSTOM), or remove "flexmoba" from config.json to serve full attention'
        )
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    settings = [layer_arguments(entry, layer) for layer in range(layers)]
    for options in settings:
        check_served(options)
    check_features(
        {
            f"kv_cache_dtype={selected.kv_cache_dtype}": selected.kv_cache_dtype
            not in (None, "auto"),
            "a sliding window": selected.has_sliding_window,
            "latent attention (MLA)": selected.use_mla,
            "sparse attention": selected.use_sparse,
            "attention sinks": selected.has_sink,
            "bidirectional prefixes": selected.use_mm_prefix,
            "attention that is not causal": selected.use_non_causal,
            "a KV connector": selected.use_kv_connector,
            "context parallelism": selected.use_pcp or selected.use_dcp,
            "speculative decoding": vllm_config.speculative_config is not None,
            "batch invariance": selected.use_batch_invariant,
        }
    )
    if selected.block_size is not None:
        check_page_size(entry, selected.block_size)
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks, kv_heads = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    if ranks > kv_heads and any(options.get("gate") == "group" for options in settings):
        raise ValueError(
            f'gate="group" sums over the query heads of a KV head, but {ranks} ranks divide the '
            f"heads of {kv_heads} KV heads; use --tensor-parallel-size {kv_heads} or less"
        )


def check_features(used: Mapping[str, bool]) -> None:
    """Raises if the model or the server uses one of these features."""
    names = [name for name, is_used in used.items() if is_used]
    if names:
        raise ValueError(
            f"flexmoba does not support {', '.join(names)} in vLLM; omit the option of the server, "
            "or run the model by generate of transformers"
        )


def check_page_size(entry: Mapping[str, Any], page_size: int) -> None:
    """Raises unless a page holds one block."""
    if page_size != entry["block_size"]:
        raise ValueError(
            f"a page must hold one block of {entry['block_size']} tokens, got --block-size "
            f"{page_size}; pass --block-size {entry['block_size']}"
        )
