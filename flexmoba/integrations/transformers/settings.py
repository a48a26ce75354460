"""Settings of the layers of a model: ``config.flexmoba``, a dictionary saved with the config."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from flexmoba.checks import check_block_size, check_topk
from flexmoba.integrations.entry import CHILD, LOCAL, layer_arguments
from flexmoba.nn import FlexMoba

NAME = "flexmoba"  # the value of attn_implementation
OPTIONS = ("gate", "gate_block_size", "sink_blocks", "local_blocks", "impl", "kernel_options")
# Attentions that do not read their name from the config, where the name is "flexmoba".
LOCAL_ATTENTIONS = ("sdpa", "eager", "flex_attention")
LOCAL_TYPES = ("sliding_attention", "chunked_attention")  # local layers in config.layer_types


class Settings(NamedTuple):
    """Settings of one layer in its current mode, training or evaluation.

    Attributes:
        block_size: Keys in a block.
        topk: Blocks that each query attends to, its own block included; None for full attention.
        options: Other keyword arguments of `flex_moba`.
    """

    block_size: int
    topk: int | None
    options: Mapping[str, Any]


def settings_of(module: nn.Module) -> Settings:
    """Returns the settings of an attention module, from its `FlexMoba` or else from its config."""
    own = module._modules.get(CHILD)
    if isinstance(own, FlexMoba):
        return Settings(own.block_size, own.current_topk, own.options)
    given = arguments_for(module, getattr(module.config, CHILD, None))
    training = module.training or given["eval_topk"] == "same"
    topk = given["topk"] if training else given["eval_topk"]
    options = {name: value for name, value in given.items() if name in OPTIONS}
    return Settings(given["block_size"], topk, options)


def arguments_for(module: nn.Module, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments of `FlexMoba` for an attention module, from the config entry."""
    if entry is None:
        raise ValueError(
            f"{name_of(module)} has no block_size and topk; call flexmoba.integrations."
            "transformers.convert(model, block_size=..., topk=...), or load the model with a "
            'config that has flexmoba = {"block_size": ..., "topk": ...}'
        )
    layer: Any = module.layer_idx
    return layer_arguments(entry, layer)


def local_layers(config: Any) -> list[int]:
    """Returns the indices of the layers with a sliding window or chunks, if others are global.

    Local layers keep the model's own attention, which already is sparse. If all layers have a
    window, the result is empty: all layers are converted, for contexts up to the window.
    """
    types = getattr(config, "layer_types", None) or ()
    if "full_attention" not in types:
        return []
    return [layer for layer, kind in enumerate(types) if kind in LOCAL_TYPES]


def is_local(module: nn.Module) -> bool:
    """Returns whether an attention module keeps the model's own attention."""
    return getattr(module, "layer_idx", None) in local_layers(getattr(module, "config", None))


def local_attention_of(config: Any) -> str:
    """Returns the name of the model's own attention, which `convert` wrote into the config."""
    name: str | None = (getattr(config, CHILD, None) or {}).get(LOCAL)
    if name not in LOCAL_ATTENTIONS:
        raise ValueError(
            f"local_attention in config.flexmoba must be one of {', '.join(LOCAL_ATTENTIONS)}, for "
            f"the layers of model type {config.model_type!r} with a sliding window or chunks, got "
            f"{name!r}; call flexmoba.integrations.transformers.convert, which sets it"
        )
    return name


def checked_entry(
    config: Any, block_size: int, topk: Any, eval_topk: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Checks the arguments of `convert`, and returns them as an entry for the config."""
    local = local_layers(config)
    check_block_size(block_size)
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"options must be among {', '.join(OPTIONS)}, got {name}; omit it")
    entry = {"block_size": block_size, "topk": topk, "eval_topk": eval_topk, **options}
    entry = {name: _one_or_one_per_layer(name, value, config) for name, value in entry.items()}
    for name in ("topk", "eval_topk"):
        value = entry[name]
        if isinstance(value, list):
            for layer in local:
                if value[layer] not in (None, "same"):
                    raise ValueError(
                        f"{name} must be None for layer {layer}, which keeps its sliding window or "
                        f"chunks (config.layer_types), got {value[layer]}; pass None, or one value "
                        "for all global layers"
                    )
        for k in value if isinstance(value, list) else [value]:
            if name == "topk" or k != "same":
                check_topk(k, none_allowed=True)
            if k == 1 and options["sink_blocks"] == 1:
                raise ValueError(
                    f"{name}=1 selects only the own block, without the sink block that convert "
                    "selects by default (sink_blocks=1); pass at least 2, or sink_blocks=0"
                )
    return entry


def _one_or_one_per_layer(name: str, value: Any, config: Any) -> Any:
    """Returns a setting, as a list if it has a value for each layer."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    if len(value) != config.num_hidden_layers:
        raise ValueError(
            f"{name} must be one value, or one for each of the {config.num_hidden_layers} layers, "
            f"got {len(value)}; pass one per layer"
        )
    return list(value)


def name_of(module: nn.Module) -> str:
    """Returns the class and the model type of a module, for error messages."""
    config: Any = getattr(module, "config", None)
    return f"{type(module).__name__} of model type {getattr(config, 'model_type', None)!r}"
