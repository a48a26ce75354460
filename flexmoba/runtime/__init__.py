"""What everything else runs on: autocast, tracing, and Triton where it is installed.

`triton_launch` imports Triton, so that kernels alone import it.
"""

import importlib.util

from flexmoba.runtime.autocast import autocast_dtype, without_autocast
from flexmoba.runtime.tracing import (
    has_values,
    is_transformed,
    no_second_derivatives,
    values_readable,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None

__all__ = [
    "HAS_TRITON",
    "autocast_dtype",
    "has_values",
    "is_transformed",
    "no_second_derivatives",
    "values_readable",
    "without_autocast",
]
