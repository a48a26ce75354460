"""The OpenAI-compatible server of transformers, for one converted model.

``transformers serve`` accepts only attentions that it knows, and has no option for the page size of
a model. `serve` starts the same server with both.
"""

from typing import Any

from transformers import AutoConfig

from flexmoba.integrations.entry import CHILD
from flexmoba.integrations.transformers.batching import check_batching
from flexmoba.integrations.transformers.convert import register
from flexmoba.integrations.transformers.settings import NAME


def serve(model: str, **options: Any) -> Any:
    """Serves a converted model by transformers' server with continuous batching.

    Args:
        model: The folder or the name of the model, whose config has the settings of `convert`.
        options: Arguments of ``transformers serve``, such as ``port``, ``device`` and
            ``cb_num_blocks``. With ``non_blocking=True`` the server runs in a thread.

    Returns:
        The server of transformers.

    Raises:
        ImportError: The requirements of the server are missing.
        ValueError: The model was not converted.
        NotImplementedError: Continuous batching does not support the model.
    """
    config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    entry = getattr(config, CHILD, None)
    if entry is None:
        raise ValueError(
            f"the config of {model} has no flexmoba settings; convert the model by flexmoba."
            "integrations.transformers.convert, and save it by save_pretrained"
        )
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving import model_manager
    except ImportError as error:
        raise ImportError(
            'the server of transformers needs more packages; install them with "pip install '
            "'flexmoba[serve]'\""
        ) from error
    register()
    page_size = entry["block_size"]

    class Manager(model_manager.ModelManager):
        """Loads models with MoBA."""

        def _validate_args(self) -> None:
            """Accepts the attention, which transformers does not know."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            loaded = super()._load_model(*args, **kwargs)
            check_batching(loaded, page_size)
            return loaded

    original = model_manager.ModelManager
    model_manager.ModelManager = Manager
    try:
        return Serve(
            force_model=model,
            continuous_batching=True,
            attn_implementation=NAME,
            cb_block_size=page_size,
            **options,
        )
    finally:
        model_manager.ModelManager = original
