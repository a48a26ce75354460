"""Inference: a cache of keys, values and mean keys, prefill in chunks, and sparse decoding."""

from flexmoba.cache.append import next_positions
from flexmoba.cache.attention import CachedTensors, attend_rows
from flexmoba.cache.checks import (
    check_new_padding,
    check_new_tokens,
    check_no_gradients,
    check_queries,
)
from flexmoba.cache.decode import (
    MAX_STEP_QUERIES,
    attend_to_gathered,
    has_kernels,
    select_for_step,
)
from flexmoba.cache.moba_cache import MobaCache
from flexmoba.cache.options import CachedCall
from flexmoba.cache.storage import storage

__all__ = [
    "MAX_STEP_QUERIES",
    "CachedCall",
    "CachedTensors",
    "MobaCache",
    "attend_rows",
    "attend_to_gathered",
    "check_new_padding",
    "check_new_tokens",
    "check_no_gradients",
    "check_queries",
    "has_kernels",
    "next_positions",
    "select_for_step",
    "storage",
]
