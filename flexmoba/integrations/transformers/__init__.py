"""Hugging Face transformers: ``attn_implementation="flexmoba"``, model conversion, and a cache.

Adds arXiv 2502.13189, Sec. 2.2, to models that dispatch their attention.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError(
        'flexmoba.integrations.transformers needs Hugging Face transformers; install it with "pip '
        "install 'flexmoba[transformers]'\""
    )

from flexmoba.integrations.transformers.cache import FlexMobaCache
from flexmoba.integrations.transformers.convert import attach, convert, register
from flexmoba.integrations.transformers.server import serve

__all__ = ["FlexMobaCache", "attach", "convert", "register", "serve"]
