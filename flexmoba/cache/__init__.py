"""Inference: a cache of keys, values and mean keys, prefill in chunks, and sparse decoding."""

from flexmoba.cache.append import next_positions
from flexmoba.cache.checks import (
    check_new_padding,
    check_new_tokens,
    check_no_gradients,
    check_queries,
)
from flexmoba.cache.moba_cache import MobaCache
from flexmoba.cache.storage import storage

__all__ = [
    "MobaCache",
    "check_new_padding",
    "check_new_tokens",
    "check_no_gradients",
    "check_queries",
    "next_positions",
    "storage",
]
