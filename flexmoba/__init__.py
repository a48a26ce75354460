"""Mixture of Block Attention (MoBA, arXiv 2502.13189) with Triton kernels and FlexAttention."""

import flexmoba.flops  # noqa: F401 (registers the FLOP formulas with torch)
from flexmoba.attention import flex_moba, selected_attention
from flexmoba.block_mask import moba_block_mask
from flexmoba.cache import MobaCache
from flexmoba.gate import moba_select
from flexmoba.reference import moba_reference
from flexmoba.window import window_attention

__version__ = "0.1.0"
__all__ = [
    "MobaCache",
    "flex_moba",
    "moba_block_mask",
    "moba_reference",
    "moba_select",
    "selected_attention",
    "window_attention",
]
