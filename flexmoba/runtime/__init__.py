"""Helpers for autocast, tracing, signatures and Triton.

Import `triton_launch` directly and only from kernels, because it imports Triton.
"""

import importlib.util

from flexmoba.runtime.autocast import autocast_dtype, without_autocast
from flexmoba.runtime.devices import has_large_shared_memory
from flexmoba.runtime.signatures import accepts, described
from flexmoba.runtime.tracing import (
    has_values,
    is_plain_call,
    is_transformed,
    no_second_derivatives,
    values_readable,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None

__all__ = [
    "HAS_TRITON",
    "accepts",
    "autocast_dtype",
    "described",
    "has_large_shared_memory",
    "has_values",
    "is_plain_call",
    "is_transformed",
    "no_second_derivatives",
    "values_readable",
    "without_autocast",
]
