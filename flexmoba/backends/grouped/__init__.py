"""The kernels of the fused backend for selections that the query heads of a KV head share.

A program processes one token: the query heads of its KV head are the rows of the matrix products,
and a loop reads the selected blocks. So queries are not sorted, and there are no partial outputs.
The gradients of keys and values take the tokens that selected each block, sorted by block.
"""

from flexmoba.backends.grouped.operator import grouped_attention, supports_grouped

__all__ = ["grouped_attention", "supports_grouped"]
