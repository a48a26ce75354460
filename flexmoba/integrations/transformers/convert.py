"""Register the attention with transformers, and convert a model to it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexmoba.integrations.transformers.local import layer_attention, layer_mask
from flexmoba.integrations.transformers.packing import pass_positions
from flexmoba.integrations.transformers.settings import (
    CHILD,
    LOCAL,
    LOCAL_ATTENTIONS,
    arguments_for,
    checked,
    is_local,
    local_layers,
    name_of,
)
from flexmoba.nn import FlexMoba

NAME = "flexmoba"
Topk = int | None
Model = TypeVar("Model", bound=nn.Module)


def register() -> None:
    """Makes ``attn_implementation="flexmoba"`` known to transformers; again is no harm.

    A model loaded with it takes its settings from ``config.flexmoba``, which `convert` writes.
    """
    AttentionInterface.register(NAME, layer_attention)
    AttentionMaskInterface.register(NAME, layer_mask)


def convert(
    model: Model,
    block_size: int,
    topk: Topk | Sequence[Topk],
    *,
    eval_topk: Topk | Literal["same"] | Sequence[Topk | Literal["same"]] = "same",
    **options: Any,
) -> Model:
    """Makes a transformers model attend by `flex_moba`, in place; its weights stay as they are.

    Every causal self-attention of its (text) decoder then computes Eq. 2 to 6 of arXiv 2502.13189,
    Sec. 2.2. If some layers are global and others have a sliding window or chunks, these keep the
    attention that the model had. The settings go to the model's config, so ``save_pretrained``
    saves them; load with ``from_pretrained(..., attn_implementation="flexmoba")`` after `register`.
    Each converted module gets a `FlexMoba` of its own, without parameters, whose settings hold for
    this session.

    Args:
        model: A transformers model that dispatches its attention.
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own included; None for full attention. Or one
            value for each layer: ``[3] * 29 + [None] * 3`` keeps the last three layers full, as in
            the paper's Sec. 2.3. None for layers that keep their window or chunks.
        eval_topk: The same outside training (``model.eval()``); ``"same"`` for no other.
        options: Of `flex_moba`: ``gate``, ``sink_blocks``, ``local_blocks``, ``impl``,
            ``kernel_options``.

    Returns:
        The model.

    Raises:
        TypeError: A setting is of the wrong type, or no option.
        ValueError: A setting is out of its range, or the model dispatches no attention, or has one
            that cannot be kept, or its attention selects keys by an indexer of its own.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flexmoba.integrations.transformers import convert
        >>> config = LlamaConfig(
        ...     vocab_size=99,
        ...     hidden_size=32,
        ...     intermediate_size=64,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> model = convert(LlamaForCausalLM(config), block_size=8, topk=[3, None])
        >>> model.model.layers[1].self_attn.flexmoba
        FlexMoba(block_size=8, topk=None)
        >>> model.config.flexmoba
        {'block_size': 8, 'topk': [3, None], 'eval_topk': 'same'}
        >>> ids = torch.randint(99, (1, 100))
        >>> model(ids, labels=ids).loss.backward()
    """
    config = _text_config(model)
    entry = checked(config, block_size, topk, eval_topk, options)
    if local_layers(config):
        entry[LOCAL] = _own_attention(model, config)
    made = _made(model, entry)  # before anything changes, so that a refusal changes nothing
    register()
    _dispatch(model, config)
    config.flexmoba = entry
    return _given(model, made)


def attach(model: Model) -> Model:
    """Gives each attention module the `FlexMoba` that ``config.flexmoba`` describes.

    `convert` does so. After ``from_pretrained`` it is needed only to change settings by module, as
    a schedule does in training, and for models that keep ``position_ids`` from their attention:
    they pass them on from then on, so that packed documents stay apart.

    Args:
        model: A transformers model whose config has the settings.

    Returns:
        The model.

    Raises:
        ValueError: There is no attention module, or there are no settings.
    """
    return _given(model, _made(model, getattr(_text_config(model), CHILD, None)))


def _made(model: nn.Module, entry: Mapping[str, Any] | None) -> list[tuple[nn.Module, FlexMoba]]:
    """Each attention module, and a `FlexMoba` for it."""
    modules = list(_attention_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no causal self-attention that it dispatches, so it cannot "
            "be converted"
        )
    for module in modules:
        if any(name.split(".")[-1] == "indexer" for name, _ in module.named_modules()):
            raise ValueError(
                f"{name_of(module)} has an indexer of its own, which selects the keys of each "
                "query, so it cannot be converted; keep its own attention"
            )
    return [(module, FlexMoba(**arguments_for(module, entry))) for module in modules]


def _given(model: Model, made: list[tuple[nn.Module, FlexMoba]]) -> Model:
    for module, own in made:
        module.add_module(CHILD, own.train(module.training))
    config = _text_config(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config and part.base_model is part:
            pass_positions(part)
    return model


def _text_config(model: Any) -> Any:
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return model.config.get_text_config(decoder=True)


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    config = _text_config(model)
    for module in model.modules():
        if (
            getattr(module, "config", None) is config
            and isinstance(getattr(module, "layer_idx", None), int)
            and getattr(module, "is_causal", False)
            and not is_local(module)
        ):
            yield module


def _own_attention(model: nn.Module, config: Any) -> str:
    """What the model attends by before it is converted: its local layers go on with it."""
    name: str = config._attn_implementation
    if name == NAME:  # converted before, or loaded with that name
        own = next(x for x in model.modules() if getattr(x, "config", None) is config)
        usual = "sdpa" if getattr(own, "_supports_sdpa", False) else "eager"
        name = (getattr(config, CHILD, None) or {}).get(LOCAL, usual)
    if name not in LOCAL_ATTENTIONS:
        raise ValueError(
            f"{type(model).__name__} has attn_implementation={name!r}, which its layers with a "
            "sliding window or chunks cannot keep beside flexmoba; call "
            'model.set_attn_implementation with "sdpa", "eager" or "flex_attention" before convert'
        )
    return name


def _dispatch(model: Any, config: Any) -> None:
    if config is model.config:
        model.set_attn_implementation(NAME)
    else:  # the part of a larger model that generates text
        parts = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
        model.set_attn_implementation(dict.fromkeys(parts, NAME))
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} does not dispatch its attention, so it cannot be converted"
        )
