"""The portable backend: plain tensor operations on any device, in any dtype, with gradients."""

from flexmoba.backends.portable.attention import portable_attention

__all__ = ["portable_attention"]
