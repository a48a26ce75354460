"""Modules that use Mixture of Block Attention or Native Sparse Attention in a model."""

from flexmoba.nn.attention import MobaAttention
from flexmoba.nn.block_compress import BlockCompress
from flexmoba.nn.flex_moba import FlexMoba
from flexmoba.nn.key_conv import KeyConv, KeyConvCache
from flexmoba.nn.nsa_attention import NsaAttention

__all__ = [
    "BlockCompress",
    "FlexMoba",
    "KeyConv",
    "KeyConvCache",
    "MobaAttention",
    "NsaAttention",
]
