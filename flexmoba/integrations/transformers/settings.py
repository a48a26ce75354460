"""What a model's config says of its layers: ``config.flexmoba``, a dictionary saved with it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from flexmoba.checks import check_block_size, check_topk
from flexmoba.nn import FlexMoba

CHILD = "flexmoba"  # the name of a layer's own module, and of the entry in the config
OPTIONS = ("gate", "sink_blocks", "local_blocks", "impl", "kernel_options")
# How the layers attend that are not converted: the name of the model's own attention.
LOCAL = "local_attention"
LOCAL_ATTENTIONS = ("sdpa", "eager", "flex_attention")  # those that ask no config for their name
LOCAL_TYPES = ("sliding_attention", "chunked_attention")  # among the layer_types of a config


class Settings(NamedTuple):
    """How one layer attends: `FlexMoba`'s arguments, for training or evaluation."""

    block_size: int
    topk: int | None
    options: Mapping[str, Any]


def settings_of(module: nn.Module) -> Settings:
    """The settings of an attention module: its own `FlexMoba`'s, or else its config's."""
    own = module._modules.get(CHILD)
    if isinstance(own, FlexMoba):
        return Settings(own.block_size, own.current_topk, own.options)
    given = arguments_for(module, getattr(module.config, CHILD, None))
    training = module.training or given["eval_topk"] == "same"
    topk = given["topk"] if training else given["eval_topk"]
    options = {name: value for name, value in given.items() if name in OPTIONS}
    return Settings(given["block_size"], topk, options)


def arguments_for(module: nn.Module, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """`FlexMoba`'s arguments for an attention module, from the entry of its config."""
    if entry is None:
        raise ValueError(
            f"{name_of(module)} has no block_size and topk: call flexmoba.integrations."
            "transformers.convert(model, block_size=..., topk=...), or load the model with a "
            'config that has flexmoba = {"block_size": ..., "topk": ...}'
        )
    layer: Any = module.layer_idx
    return {"eval_topk": "same"} | {
        name: value[layer] if isinstance(value, list) else value
        for name, value in entry.items()
        if name != LOCAL
    }


def local_layers(config: Any) -> list[int]:
    """The layers of a sliding window or of chunks, if others are global.

    They keep the model's own attention, which already is sparse. Where all layers have a window,
    all are converted, and serve contexts up to its length.
    """
    types = getattr(config, "layer_types", None) or ()
    if "full_attention" not in types:
        return []
    return [layer for layer, kind in enumerate(types) if kind in LOCAL_TYPES]


def is_local(module: nn.Module) -> bool:
    """Whether an attention module keeps the model's own attention."""
    return getattr(module, "layer_idx", None) in local_layers(getattr(module, "config", None))


def local_attention_of(config: Any) -> str:
    """The name of the model's own attention, as `convert` wrote it into the config."""
    name: str | None = (getattr(config, CHILD, None) or {}).get(LOCAL)
    if name not in LOCAL_ATTENTIONS:
        raise ValueError(
            f"local_attention in config.flexmoba must be one of {', '.join(LOCAL_ATTENTIONS)}, for "
            f"the layers of model type {config.model_type!r} that keep their sliding window or "
            f"chunks, got {name!r}; call flexmoba.integrations.transformers.convert, which sets it"
        )
    return name


def checked(
    config: Any, block_size: int, topk: Any, eval_topk: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry for a config. ``topk`` and ``eval_topk`` may be sequences, a value per layer."""
    local = local_layers(config)
    check_block_size(block_size)
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"options must be among {', '.join(OPTIONS)}, got {name}")
    entry = {"block_size": block_size, "topk": topk, "eval_topk": eval_topk, **options}
    for name in ("topk", "eval_topk"):
        value = entry[name]
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = entry[name] = list(value)
            if len(value) != config.num_hidden_layers:
                raise ValueError(
                    f"{name} must be one value, or one for each of the "
                    f"{config.num_hidden_layers} layers, got {len(value)}"
                )
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
    return entry


def name_of(module: nn.Module) -> str:
    """What an error calls a module: its class and its model."""
    config: Any = getattr(module, "config", None)
    return f"{type(module).__name__} of model type {getattr(config, 'model_type', None)!r}"
