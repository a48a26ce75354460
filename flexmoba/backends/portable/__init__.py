"""The portable backend: plain tensor operations on any device, in any dtype, with gradients."""

from flexmoba.backends.portable.attention import (
    full_attention,
    full_attention_backward,
    portable_attention,
)
from flexmoba.backends.portable.tile_math import is_within

__all__ = ["full_attention", "full_attention_backward", "is_within", "portable_attention"]
