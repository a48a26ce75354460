"""Where the keys of a cache lie whose blocks are dealt to the ranks in turn."""

from typing import NamedTuple

import torch
from torch import Tensor


class CyclicBlocks(NamedTuple):
    """Block ``i`` of the sequence is block ``i // ranks`` of rank ``i % ranks``.

    So consecutive tokens lie on each rank one after the other.

    Attributes:
        rank: The index of this rank.
        ranks: Number of ranks.
        block_size: Keys in a block.
    """

    rank: int
    ranks: int
    block_size: int

    def owners(self, positions: Tensor) -> Tensor:
        """Returns the rank of each position."""
        return positions // self.block_size % self.ranks

    def keys_before(self, position: int, rank: int) -> int:
        """Returns the number of keys before a position that a rank has."""
        rounds, rest = divmod(position, self.ranks * self.block_size)
        rest -= rank * self.block_size
        return rounds * self.block_size + min(max(rest, 0), self.block_size)

    def positions(self, first: int, end: int, device: torch.device) -> Tensor:
        """Returns the positions of this rank's keys ``first`` to ``end - 1``."""
        key = torch.arange(first, end, device=device)
        of_others = (self.ranks - 1) * self.block_size  # keys between two blocks of this rank
        return key + key // self.block_size * of_others + self.rank * self.block_size

    def on_this_rank(self, blocks: Tensor) -> Tensor:
        """Returns the index of each block on this rank; -1 for -1 and blocks of other ranks."""
        return (blocks // self.ranks).masked_fill(blocks % self.ranks != self.rank, -1)
