"""Options and sizes of the gate.

They are NamedTuples because torch.compile traces their construction in every supported version.
"""

from typing import NamedTuple

from torch import Tensor

from flexmoba.blocks import TILE


class GateOptions(NamedTuple):
    """Whose scores select, and which blocks are selected without a score; see `moba_select`.

    Attributes:
        per: ``"token"``, ``"group"`` or ``"tile"``.
        sink_blocks: First blocks that every query selects.
        local_blocks: Blocks right before the own block that every query selects.
    """

    per: str = "token"
    sink_blocks: int = 0
    local_blocks: int = 0

    @property
    def stride(self) -> int:
        """Queries that share a selection."""
        return TILE if self.per == "tile" else 1

    @property
    def forced(self) -> int:
        """Blocks that are selected without a score, beside the own block."""
        return self.sink_blocks + self.local_blocks


class Candidates(NamedTuple):
    """The blocks that a query may select; by default the past blocks, or all blocks if not causal.

    Attributes:
        first: ``(B, Lq)`` int32, the first candidate block of each query; None for block 0.
        end: ``(B, Lq)`` int32, the block after the last candidate; None for the own block if
            causal, else for the number of blocks.
        keys_of_block: ``(B, blocks)`` int32, the number of keys in each block, where blocks other
            than the last one may be short: a mean is over these keys. None if they are full.
    """

    first: Tensor | None = None
    end: Tensor | None = None
    keys_of_block: Tensor | None = None


class GateSizes(NamedTuple):
    """Sizes of one selection.

    Attributes:
        block_size: Keys in a block.
        wanted: Blocks to select, without the own block.
        offset: Position of the first row.
        is_causal: Whether only past blocks are candidates.
    """

    block_size: int
    wanted: int
    offset: int
    is_causal: bool

    def width(self, gate: GateOptions) -> int:
        """Columns of the selection; more than ``wanted`` if sinks and local blocks alone are."""
        return max(self.wanted, gate.forced)

    def scored(self, gate: GateOptions) -> int:
        """Blocks that are selected by their scores."""
        return max(0, self.wanted - gate.forced)
