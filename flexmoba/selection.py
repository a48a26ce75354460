"""The selection: what a gate makes, and what a backend attends to."""

from typing import NamedTuple

from torch import Tensor


class BlockSelection(NamedTuple):
    """The blocks that each query attends to.

    It is a NamedTuple because torch.compile traces its construction in every supported version.

    Attributes:
        routed: ``(B, Hq, Lq, T)`` int32, block indices without duplicates in a row; -1 for none.
            If causal, all of them are before the query's own block.
        block_size: Keys in a block.
        own: ``(B, Hq, Lq)`` bool, whether each query attends to its own block; None if all do.
            Ignored unless causal; if not, the own block is routed like any other.
        keys_of_block: ``(B, Hkv, blocks)`` int32, the number of keys in each block, from its first
            slot on; None if all blocks but the last one are full. Not for causal calls.
        per_tile: Whether ``routed`` has a row for each tile of 128 queries, ``(B, Hq, tiles, T)``.
    """

    routed: Tensor
    block_size: int
    own: Tensor | None = None
    keys_of_block: Tensor | None = None
    per_tile: bool = False
