"""The kernels of the fused backend for selections that the query heads of a KV head share.

A program processes a tile of consecutive tokens: their query heads are the rows of the matrix
products, and a loop reads each block that any of them selected. So queries are not sorted, and
there are no partial outputs. The gradients of keys and values take the tokens that selected each
block, sorted by block.
"""

from flexmoba.backends.grouped.operator import grouped_attention, supports_grouped

__all__ = ["grouped_attention", "supports_grouped"]
