"""The backends that call FlexAttention: over routed tiles, or with a BlockMask."""

from flexmoba.backends.flex.block_masks import full_mask, selection_mask
from flexmoba.backends.flex.compiled import run_compiled, why_not_flex
from flexmoba.backends.flex.masked import (
    full_attention,
    masked_attention,
    range_attention,
    tile_gate_attention,
    window_attention,
)
from flexmoba.backends.flex.routed import routed_attention

__all__ = [
    "full_attention",
    "full_mask",
    "masked_attention",
    "range_attention",
    "routed_attention",
    "run_compiled",
    "selection_mask",
    "tile_gate_attention",
    "why_not_flex",
    "window_attention",
]
