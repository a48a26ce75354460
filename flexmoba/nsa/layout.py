"""The layout of packed documents and padding: slots for tokens, and for compressed blocks.

In a row of slots, every document begins at a block, and so at a multiple of ``cmp_stride``. The
compressed blocks of the row of slots therefore contain those of every document. The others, which
hold tokens of two documents or no tokens, are *unused*.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.nsa.sizes import NsaSizes
from flexmoba.sequence import Layout, lay_out, packing_of


class NsaLayout(NamedTuple):
    """The slots of the tokens and of the compressed blocks of every row.

    Attributes:
        tokens: The layout of the tokens.
        compressed: The layout of the compressed blocks. Callers list the compressed blocks of all
            documents of a row, in order. In slots, each has the index of its first token, divided
            by ``cmp_stride``.
    """

    tokens: Layout
    compressed: Layout

    def spread_compressed(self, x: Tensor) -> Tensor:
        """Moves compressed keys or values ``(B, Hkv, blocks, D)`` to slots; unused are zero."""
        source = self.compressed.token_of_slot
        if source is None or x.shape[2] > 0:
            return self.compressed.spread(x)
        return x.new_zeros((*x.shape[:2], source.shape[1], x.shape[3])) + x.sum()

    def collect_compressed(self, x: Tensor) -> Tensor:
        """Moves compressed keys or values ``(B, Hkv, blocks, D)`` from slots to their list.

        Entries after the listed compressed blocks are zero.
        """
        return self.compressed.collect(x)

    def compressed_positions(self, sizes: NsaSizes) -> Tensor:
        """Returns the position of the first token of each listed compressed block.

        Returns:
            ``(B, blocks)`` int32, counted from the first token of the document; undefined after
            the listed compressed blocks. Only for documents or padding.
        """
        slot = self.compressed.slot_of_token
        assert slot is not None
        position = slot.clamp(min=0) * sizes.cmp_stride
        if self.tokens.first_block is not None:
            position -= self.tokens.first_block.gather(1, position.long()) * sizes.block_size
        return position

    def without_unused(self, compressed: Tensor) -> Tensor:
        """Sets unused compressed keys or values ``(B, Hkv, blocks, D)``, in slots, to zero."""
        source = self.compressed.token_of_slot
        return compressed if source is None else compressed.masked_fill(_unused(source), 0.0)

    def collect_results(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Moves the output and the log-sum-exps ``(B, Hq, S, 3)`` to tokens.

        Padding gets zeros and -inf.
        """
        out, lse = self.tokens.collect(out), self.tokens.collect(lse)
        slot = self.tokens.slot_of_token
        return out, lse if slot is None else lse.masked_fill(_unused(slot), float("-inf"))


def _unused(index: Tensor) -> Tensor:
    return (index < 0)[:, None, :, None]


def nsa_layout(
    length: int,
    sizes: NsaSizes,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
) -> NsaLayout:
    """Returns the layout of rows of ``length`` tokens; without documents, nothing moves."""
    packing = packing_of(length, cu_seqlens, document_ids)
    tokens = lay_out(
        *(length, sizes.block_size, packing, key_padding_mask),
        is_causal=True,
        stride=sizes.block_size,  # so that blocks keep their size, also for short documents
    )
    assert isinstance(tokens, Layout)
    if tokens.token_of_slot is None:
        return NsaLayout(tokens, Layout(1))
    # A compressed block is used if its last slot holds a token of the document of its first slot.
    slots = tokens.token_of_slot.shape[1]
    n_compressed, first = sizes.compressed_blocks(slots), slice(None, None, sizes.cmp_stride)
    is_used = tokens.token_of_slot[:, sizes.cmp_block - 1 :][:, first] >= 0
    if tokens.first_block is not None:
        last = tokens.first_block[:, sizes.cmp_block - 1 :][:, first]
        is_used &= last == tokens.first_block[:, first][:, :n_compressed]
    index = torch.where(is_used, is_used.cumsum(1, dtype=torch.int32) - 1, -1)
    # Documents have at most as many compressed blocks as one sequence of all tokens.
    listed = sizes.compressed_blocks(length)
    slot = torch.arange(n_compressed, dtype=torch.int32, device=index.device).expand_as(index)
    # Unused ones go to an extra index, which is dropped.
    slot_of_listed = index.new_full((index.shape[0], listed + 1), -1)
    slot_of_listed = slot_of_listed.scatter(1, torch.where(is_used, index, listed).long(), slot)
    return NsaLayout(tokens, Layout(1, slot_of_listed[:, :-1], index))
