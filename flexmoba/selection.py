"""`BlockSelection`: the result of a gate, and an input of every backend."""

from typing import NamedTuple

from torch import Tensor


class BlockSelection(NamedTuple):
    """The blocks that each query attends to.

    It is a NamedTuple because torch.compile traces the construction of one in every supported
    version.

    Attributes:
        routed: ``(B, Hq, Lq, T)`` int32, block indices, distinct within a row; -1 for none. In
            causal attention, all of them are past blocks.
        block_size: Keys in a block.
        own: ``(B, Hq, Lq)`` bool, whether each query attends to its own block; None if all do.
            Used in causal attention only; otherwise ``routed`` lists the own block like any other.
        keys_of_block: ``(B, Hkv, blocks)`` int32, the number of keys in each block, which occupy
            its first slots; None if all blocks but the last one are full. Not for causal calls.
        per_tile: Whether ``routed`` has a row for each tile of 128 queries, ``(B, Hq, tiles, T)``.
    """

    routed: Tensor
    block_size: int
    own: Tensor | None = None
    keys_of_block: Tensor | None = None
    per_tile: bool = False
