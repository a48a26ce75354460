"""Registration of the attention with transformers, and conversion of models."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexmoba.integrations.entry import CHILD, LOCAL
from flexmoba.integrations.transformers.batching import register_batching
from flexmoba.integrations.transformers.local import layer_attention, layer_mask
from flexmoba.integrations.transformers.packing import pass_positions
from flexmoba.integrations.transformers.settings import (
    LOCAL_ATTENTIONS,
    NAME,
    arguments_for,
    checked_entry,
    is_local,
    local_layers,
    name_of,
)
from flexmoba.nn import FlexMoba

Topk = int | None
Model = TypeVar("Model", bound=nn.Module)


def register() -> None:
    """Registers ``attn_implementation="flexmoba"`` with transformers. Repeated calls do no harm.

    A model that is loaded with it reads its settings from ``config.flexmoba``, which `convert`
    writes.
    """
    AttentionInterface.register(NAME, layer_attention)
    AttentionMaskInterface.register(NAME, layer_mask)
    register_batching()


def convert(
    model: Model,
    block_size: int,
    topk: Topk | Sequence[Topk],
    *,
    eval_topk: Topk | Literal["same"] | Sequence[Topk | Literal["same"]] = "same",
    sink_blocks: int = 1,
    **options: Any,
) -> Model:
    """Converts a transformers model to `flex_moba`, in place. Its weights do not change.

    Every causal self-attention of its (text) decoder then computes Eq. 2 to 6 of arXiv 2502.13189,
    Sec. 2.2. If some layers are global and others have a sliding window or chunks, the others keep
    the attention that the model had. ``model.config`` holds the settings, so ``save_pretrained``
    saves them; load with ``from_pretrained(..., attn_implementation="flexmoba")`` after `register`.
    Each converted attention module gets a `FlexMoba` without parameters, ``module.flexmoba``, whose
    settings can change in training and are not saved.

    Args:
        model: A transformers model that dispatches its attention.
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own block included; None for full attention. A
            sequence gives one value for each layer: ``[3] * 29 + [None] * 3`` keeps full attention
            in the last three layers, as in the paper's Sec. 2.3. Layers that keep their window or
            chunks must have None in a sequence.
        eval_topk: ``topk`` outside training (``model.eval()``), in the same forms; ``"same"`` for
            the value of ``topk``.
        sink_blocks: Number of first blocks that are always selected, 1 by default, unlike in
            `flex_moba`. They count towards ``topk``. Models that were trained with full attention
            often attend much to the first tokens (arXiv 2309.17453). Without training and without
            a sink block, every measured setting raised the loss of a 135M model at 8K tokens by 19
            to 60 %; with one, ``block_size=64, topk=16`` raised it by 1.9 and 3.3 % on two texts
            (docs/results.md, which also counts the needles that the mean loss hides). 0 is the
            gate of the paper, which ``topk=1`` needs.
        options: Options of `flex_moba`: ``gate``, ``gate_block_size``, ``local_blocks``, ``impl``
            and ``kernel_options``. A sequence gives one value for each layer.
            ``gate_block_size=8`` lowered the increases above to 1.2 and 1.8 %. It is not the
            default, since it takes time in the gate and memory for mean keys.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a transformers model, a setting has the wrong type, or an option
            does not exist.
        ValueError: A setting is out of range, the model does not dispatch causal self-attention,
            its local layers use an unsupported attention, or its attention selects keys by its own
            indexer.
        NotImplementedError: The gate does not support the block size.

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
        FlexMoba(block_size=8, topk=None, sink_blocks=1)
        >>> model.config.flexmoba
        {'block_size': 8, 'topk': [3, None], 'eval_topk': 'same', 'sink_blocks': 1}
        >>> ids = torch.randint(99, (1, 100))
        >>> model(ids, labels=ids).loss.backward()
    """
    config = _text_config(model)
    options = {"sink_blocks": sink_blocks} | options
    entry = checked_entry(config, block_size, topk, eval_topk, options)
    if local_layers(config):
        entry[LOCAL] = _own_attention(model, config)
    pairs = _new_modules(model, entry)  # may raise, so before anything changes
    register()
    _dispatch(model, config)
    config.flexmoba = entry
    return _add_modules(model, pairs)


def attach(model: Model) -> Model:
    """Adds the `FlexMoba` that ``config.flexmoba`` describes to each attention module.

    `convert` does the same. Call `attach` after ``from_pretrained`` in two cases: to change the
    settings of single modules, as `HybridSchedule` does, and for models that do not pass
    ``position_ids`` to their attention. It makes these models pass them, so that packed documents
    stay separate.

    Args:
        model: A transformers model with the settings in its config.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: The model dispatches no causal self-attention, or its config has no settings.
    """
    return _add_modules(model, _new_modules(model, getattr(_text_config(model), CHILD, None)))


def _new_modules(
    model: nn.Module, entry: Mapping[str, Any] | None
) -> list[tuple[nn.Module, FlexMoba]]:
    """Returns each attention module with a new `FlexMoba` for it."""
    modules = list(_attention_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} dispatches no causal self-attention, so it cannot be "
            "converted; call a flexmoba.nn.FlexMoba in a copy of its code"
        )
    for module in modules:
        if any(name.split(".")[-1] == "indexer" for name, _ in module.named_modules()):
            raise ValueError(
                f"{name_of(module)} selects the keys of each query by its own indexer, so it "
                "cannot be converted; keep its own attention"
            )
    return [(module, FlexMoba(**arguments_for(module, entry))) for module in modules]


def _add_modules(model: Model, pairs: list[tuple[nn.Module, FlexMoba]]) -> Model:
    for module, flex_moba in pairs:
        module.add_module(CHILD, flex_moba.train(module.training))
    config = _text_config(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config and part.base_model is part:
            pass_positions(part)
    return model


def _text_config(model: Any) -> Any:
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}; pass the complete "
            "model, with its config"
        )
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
    """Returns the name of the attention before the conversion, which local layers keep."""
    name: str = config._attn_implementation
    if name == NAME:  # the model was converted before, or loaded with this name
        owner = next(x for x in model.modules() if getattr(x, "config", None) is config)
        default = "sdpa" if getattr(owner, "_supports_sdpa", False) else "eager"
        name = (getattr(config, CHILD, None) or {}).get(LOCAL, default)
    if name not in LOCAL_ATTENTIONS:
        raise ValueError(
            f"{type(model).__name__} has attn_implementation={name!r}, which flexmoba does not "
            "support in layers with a sliding window or chunks; call model.set_attn_implementation "
            'with "sdpa", "eager" or "flex_attention" before convert'
        )
    return name


def _dispatch(model: Any, config: Any) -> None:
    if config is model.config:
        model.set_attn_implementation(NAME)
    else:  # the text decoder of a larger model
        names = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
        model.set_attn_implementation(dict.fromkeys(names, NAME))
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} does not dispatch its attention, so it cannot be converted; "
            "call a flexmoba.nn.FlexMoba in a copy of its code"
        )
