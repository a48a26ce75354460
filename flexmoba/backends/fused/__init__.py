"""Routing, attention and merge by a few Triton kernels, forward and backward.

The steps are those of the routed backend, with fewer memory transfers. Kernels gather the queries
themselves, and the kernel that merges partial outputs also attends to the own blocks. The backward
pass recomputes the weights from the final log-sum-exp, so a call saves only its inputs, output,
log-sum-exp and selection.
"""

from flexmoba.backends.fused.operator import fused_attention, why_not_fused
from flexmoba.backends.fused.tile_sizes import is_split, padded_dim

__all__ = [
    "fused_attention",
    "is_split",
    "padded_dim",
    "why_not_fused",
]
