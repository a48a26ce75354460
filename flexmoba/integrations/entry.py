"""The entry of a converted model in its config, ``config.flexmoba``, without any other library."""

from collections.abc import Mapping
from typing import Any

from flexmoba.checks import check_gate_block_size

CHILD = "flexmoba"  # the name of the entry, and of the `FlexMoba` of an attention module
SERVED = ("gate", "sink_blocks", "local_blocks")  # options of `flexmoba.paged.attend_paged`
_SIZES = ("block_size", "gate_block_size", "topk", "eval_topk")
LOCAL = "local_attention"  # the model's own attention, of the layers that are not converted


def layer_arguments(entry: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Returns the arguments of `flexmoba.nn.FlexMoba` for a layer.

    Args:
        entry: ``config.flexmoba``, in which a list has one value for each layer.
        layer: Index of the layer.
    """
    return {"eval_topk": "same"} | {
        name: value[layer] if isinstance(value, list) else value
        for name, value in entry.items()
        if name != LOCAL
    }


def mean_keys_of(settings: Mapping[str, Any], block_size: int) -> int:
    """Returns the number of mean keys in a page of a layer with these settings: its sub-blocks."""
    return check_gate_block_size(settings.get("gate_block_size"), block_size)


def mean_keys_by_layer(entry: Mapping[str, Any], layers: int) -> list[int]:
    """Returns `mean_keys_of` each of the layers of a model."""
    settings = [layer_arguments(entry, layer) for layer in range(layers)]
    return [mean_keys_of(x, x["block_size"]) for x in settings]


def check_served(options: Mapping[str, Any]) -> None:
    """Raises unless pages support these options of a converted model.

    Args:
        options: Options of `flex_moba`, such as ``gate``.

    Raises:
        NotImplementedError: Pages do not support an option.
    """
    supported: dict[str, tuple[Any, ...]] = {
        "gate": ("token", "group"),
        "impl": ("auto",),
        "kernel_options": (None,),
    }
    for name, value in options.items():
        if name in (*_SIZES, *SERVED) and name not in supported:
            continue  # any value
        values = supported.get(name, (None,))
        if value not in values:
            raise NotImplementedError(
                f"pages do not support {name}={value!r}; convert the model with {name}="
                f"{' or '.join(map(repr, values))}"
            )
