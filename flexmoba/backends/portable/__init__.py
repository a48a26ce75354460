"""Attention by plain tensor operations: any device, any floating dtype, gradients."""

from flexmoba.backends.portable.attention import portable_attention

__all__ = ["portable_attention"]
