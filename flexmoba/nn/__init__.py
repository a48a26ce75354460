"""Modules that use Mixture of Block Attention in a model."""

from flexmoba.nn.attention import MobaAttention
from flexmoba.nn.flex_moba import FlexMoba
from flexmoba.nn.key_conv import KeyConv, KeyConvCache

__all__ = ["FlexMoba", "KeyConv", "KeyConvCache", "MobaAttention"]
