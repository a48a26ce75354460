"""Options of attention to a cache."""

from typing import NamedTuple

from flexmoba.gate import GateOptions

NO_ROOM = 2**30  # the position of a token beyond the capacity; greater than any valid position


class CachedCall(NamedTuple):
    """Options of one call that attends to a cache.

    Attributes:
        topk: Blocks that each query attends to, its own block included.
        scale: Factor on the attention scores.
        gate: Options of the gate.
        block_size: Keys in a block.
    """

    topk: int
    scale: float
    gate: GateOptions
    block_size: int

    @property
    def scored(self) -> int:
        """Blocks that are selected by their scores."""
        return self.topk - 1 - self.gate.forced
