"""Routing, attention and merge by a few Triton kernels, forward and backward.

The steps are those of the routed backend with fewer memory transfers. Queries are gathered inside
the kernels; own blocks are attended to where partial outputs are merged; the backward pass
recomputes the weights from the final log-sum-exp, so that only inputs, output, log-sum-exp and the
selection are saved.
"""

from flexmoba.backends.fused.operator import fused_attention, why_not_fused

__all__ = ["fused_attention", "why_not_fused"]
