"""Options and sizes of the gate.

They are NamedTuples because torch.compile traces the construction of these in every supported
version.
"""

from typing import NamedTuple

from torch import Tensor

from flexmoba.blocks import TILE


class GateOptions(NamedTuple):
    """The scores that select blocks, and the blocks selected without a score; see `moba_select`.

    Attributes:
        per: ``"token"``, ``"group"`` or ``"tile"``.
        sink_blocks: Number of first blocks that are always selected.
        local_blocks: Number of blocks right before the own block that are always selected.
        sub_blocks: Number of sub-blocks in a block. The score of a block is the highest score of
            the mean keys of its sub-blocks.
    """

    per: str = "token"
    sink_blocks: int = 0
    local_blocks: int = 0
    sub_blocks: int = 1

    @property
    def stride(self) -> int:
        """Number of queries that share a selection."""
        return TILE if self.per == "tile" else 1

    @property
    def forced(self) -> int:
        """Number of blocks that are selected without a score, beside the own block."""
        return self.sink_blocks + self.local_blocks


class Candidates(NamedTuple):
    """The candidate blocks of each query; by default the past blocks, or all blocks if not causal.

    Attributes:
        first: ``(B, Lq)`` int32, the first candidate block of each query; None for block 0.
        end: ``(B, Lq)`` int32, the block after the last candidate. None means the own block in
            causal attention, and otherwise the number of blocks.
        keys_of_block: ``(B, blocks)`` int32, the number of keys in each block, which the mean key
            is the mean of. None if all blocks but the last one are full.
    """

    first: Tensor | None = None
    end: Tensor | None = None
    keys_of_block: Tensor | None = None


class GateSizes(NamedTuple):
    """Sizes of one selection.

    Attributes:
        block_size: Keys in a block.
        wanted: Number of blocks to select, without the own block.
        offset: Position of the first row.
        is_causal: Whether only past blocks are candidates.
    """

    block_size: int
    wanted: int
    offset: int
    is_causal: bool

    def width(self, gate: GateOptions) -> int:
        """Returns the number of columns of a selection: at least the sink and local blocks."""
        return max(self.wanted, gate.forced)

    def scored(self, gate: GateOptions) -> int:
        """Returns the number of blocks that are selected by their scores."""
        return max(0, self.wanted - gate.forced)
