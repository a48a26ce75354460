"""The entry of a converted model in its config, ``config.flexmoba``, without any other library."""

from collections.abc import Mapping
from typing import Any

CHILD = "flexmoba"  # the name of the entry, and of the `FlexMoba` of an attention module
SERVED = ("gate", "sink_blocks", "local_blocks")  # options of `flexmoba.paged.attend_paged`
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
        if name in ("block_size", "topk", "eval_topk", *SERVED) and name not in supported:
            continue  # any value
        values = supported.get(name, (None,))
        if value not in values:
            raise NotImplementedError(
                f"pages do not support {name}={value!r}; convert the model with {name}="
                f"{' or '.join(map(repr, values))}"
            )
