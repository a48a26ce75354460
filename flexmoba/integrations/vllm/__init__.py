"""vLLM: a plugin that serves converted models, ``vllm serve MODEL --attention-backend CUSTOM``.

vLLM calls `register` in each of its processes, before it reads the config of a model.
"""

import functools
from typing import Any

__all__ = ["register"]

BACKEND = "flexmoba.integrations.vllm.backend.MobaBackend"


def register() -> None:
    """Registers the attention backend with vLLM. Repeated calls do no harm.

    A model with ``config.flexmoba`` then runs with this backend, or raises an error at start-up.
    Other models run as without the plugin.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():  # by another plugin
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    # The first selection of a process would otherwise decide for all of its models.
    cached = selector._cached_get_attn_backend
    if cached.cache_parameters()["maxsize"] != 0:
        selector._cached_get_attn_backend = functools.lru_cache(maxsize=0)(cached.__wrapped__)
    platform = type(current_platform)
    if not hasattr(platform.get_attn_backend_cls, "flexmoba"):
        platform.get_attn_backend_cls = _checked(platform.get_attn_backend_cls.__func__)


def _checked(select: Any) -> Any:
    """Returns a platform's selection of a backend that does not ignore ``config.flexmoba``.

    The platform for CPU ignores ``CUSTOM``, and other platforms select by themselves if the user
    names no backend: both would run full attention.
    """

    @functools.wraps(select)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.config import get_current_vllm_config
        from vllm.v1.attention.backend import AttentionType

        from flexmoba.integrations.vllm.settings import check_selected, entry_of

        is_decoder = attn_selector_config.attn_type == AttentionType.DECODER
        entry = entry_of(get_current_vllm_config())
        if not is_decoder or (entry is None and not _is_ours(selected_backend)):
            return select(cls, selected_backend, attn_selector_config, *args, **kwargs)
        name = "none" if selected_backend is None else selected_backend.name
        check_selected(name, _is_ours(selected_backend), attn_selector_config)
        return BACKEND

    get_attn_backend_cls.flexmoba = True  # type: ignore[attr-defined]
    return classmethod(get_attn_backend_cls)


def _is_ours(backend: Any) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return backend is AttentionBackendEnum.CUSTOM and backend.get_path() == BACKEND
