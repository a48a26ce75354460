"""The sizes of one call of Native Sparse Attention."""

from typing import NamedTuple

from flexmoba.blocks import ceil_div
from flexmoba.gate import GateOptions


class NsaSizes(NamedTuple):
    """Sizes of blocks and of the selection.

    It is a NamedTuple because torch.compile traces the construction of one in every supported
    version.

    Attributes:
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks. It divides
            ``cmp_block`` and ``block_size``.
        block_size: Keys in a block of the selected branch.
        topk: Number of blocks that each query selects, including the own block.
        sink_blocks: Number of first blocks that are always selected.
        local_blocks: Number of blocks right before the own block that are always selected.
    """

    cmp_block: int
    cmp_stride: int
    block_size: int
    topk: int
    sink_blocks: int
    local_blocks: int

    @property
    def gate(self) -> GateOptions:
        """The blocks that are selected without a score."""
        return GateOptions("group", self.sink_blocks, self.local_blocks)

    @property
    def scored(self) -> int:
        """Number of blocks that are selected by their importance."""
        return self.topk - 1 - self.sink_blocks - self.local_blocks

    def compressed_blocks(self, kv_len: int) -> int:
        """Returns the number of compressed blocks of ``kv_len`` tokens; all of them are full."""
        if kv_len < self.cmp_block:
            return 0
        return (kv_len - self.cmp_block) // self.cmp_stride + 1

    def blocks(self, kv_len: int) -> int:
        """Returns the number of blocks of ``kv_len`` tokens; the last one may be shorter."""
        return ceil_div(kv_len, self.block_size)
