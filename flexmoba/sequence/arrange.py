"""Chooses the layout of each row's sequences, and writes it down as integers.

Nothing waits for the device but the count of ``document_ids``.
"""

import torch
from torch import Tensor

from flexmoba.blocks import ceil_div
from flexmoba.sequence.documents import Packing, positions_of_real_tokens
from flexmoba.sequence.layout import InPlaceLayout, Layout, Sequences, WindowLayout

# Slots of a layout for each token, beyond which documents stay in place. On an H100, at 64K tokens,
# the layout takes more memory from there on, and more time from about three on.
_MOST_SLOTS = 2


def lay_out(
    length: int,
    block_size: int,
    packing: Packing | None,
    key_padding_mask: Tensor | None,
    *,
    is_causal: bool,
    is_full: bool = False,
    stride: int = 1,
) -> Sequences:
    """The layout of the sequences of each row.

    Args:
        length: Tokens of a row, at least 1.
        block_size: Keys in a block.
        packing: The documents, or None.
        key_padding_mask: ``(B, L)`` bools, True for real tokens, or None.
        is_causal: Whether queries see only keys at or before their positions.
        is_full: Whether queries attend to all blocks of their sequence.
        stride: Queries that share a selection; block sizes are multiples of it.
    """
    if packing is None and key_padding_mask is None:
        return Layout(block_size)
    if packing is not None and is_causal and is_full:
        first_key = packing.first_token.int()
        return WindowLayout(first_key, packing.longest)
    longest = length if packing is None else packing.longest
    # No longer than a sequence, but queries of two documents never share a selection.
    block_size = min(block_size, ceil_div(longest, stride) * stride)
    if packing is None:
        assert key_padding_mask is not None
        return without_padding(key_padding_mask, block_size, is_causal=is_causal)
    # Each document adds at most one block to its share of the tokens.
    n_blocks = (length + packing.n_documents * (block_size - 1)) // block_size
    n_blocks = min(n_blocks, length)
    if is_causal and stride == 1 and n_blocks * block_size > _MOST_SLOTS * length:
        return _in_place(packing.first_token.int(), block_size)
    return _by_documents(packing.first_token, block_size, n_blocks, is_causal=is_causal)


def without_padding(real: Tensor, block_size: int, *, is_causal: bool = True) -> Layout:
    """The real tokens of every row, ``(B, L)`` bools, one after the other from slot 0 on."""
    slot_of_token = positions_of_real_tokens(real)
    length = real.shape[1]
    slots = length if is_causal else ceil_div(length, block_size) * block_size
    layout = Layout(block_size, slot_of_token, _inverse(slot_of_token, slots))
    if is_causal:
        return layout
    end_block = ceil_div(real.sum(1, keepdim=True, dtype=torch.int32), block_size)
    return layout._replace(
        end_block=end_block.repeat(1, slots), keys_of_block=_keys_of_blocks(layout)
    )


def _by_documents(
    first_token: Tensor, block_size: int, n_blocks: int, *, is_causal: bool
) -> Layout:
    """Documents given by the first token of each token's, ``(B, L)``, in whole blocks."""
    batch, length = first_token.shape
    token = torch.arange(length, dtype=torch.int32, device=first_token.device)
    place = token - first_token.int()
    block = (place % block_size == 0).cumsum(1, dtype=torch.int32) - 1
    slot = (block * block_size + place % block_size).long()
    slots = torch.arange(n_blocks * block_size, dtype=torch.int32, device=token.device)
    token_of_slot = torch.full_like(slots, -1).repeat(batch, 1)
    token_of_slot = token_of_slot.scatter(1, slot, token.repeat(batch, 1))
    own_block = (slots // block_size).repeat(batch, 1)
    first_block = own_block.scatter(1, slot, block - place // block_size)
    layout = Layout(block_size, slot.int(), token_of_slot, first_block)
    if is_causal:
        return layout
    ends = torch.nn.functional.pad(first_token.diff(dim=1) != 0, (0, 1), value=True)
    last_token = torch.where(ends, token, length).flip(1).cummin(1).values.flip(1)
    last_block = block.gather(1, last_token.long())
    end_block = torch.zeros_like(own_block).scatter(1, slot, last_block + 1)
    return layout._replace(end_block=end_block, keys_of_block=_keys_of_blocks(layout))


def _keys_of_blocks(layout: Layout) -> Tensor:
    assert layout.token_of_slot is not None
    there = layout.token_of_slot >= 0
    return there.view(there.shape[0], -1, layout.block_size).sum(2, dtype=torch.int32)


def _in_place(first_token: Tensor, block_size: int) -> InPlaceLayout:
    """Documents given by the first token of each token's, ``(B, L)`` int32."""
    length = first_token.shape[1]
    token = torch.arange(length, dtype=torch.int32, device=first_token.device)
    place = token - first_token
    first_key = token - place % block_size
    begins = first_key == token
    # A block is full if the last of its keys is of the same document.
    last = torch.nn.functional.pad(first_token[:, block_size - 1 :], (0, block_size - 1), value=-1)
    begins_full = begins & (last == first_token)
    first = first_token.long()

    def before(x: Tensor) -> Tensor:
        """How many of ``x`` stand before each token's document."""
        return (x.cumsum(1, dtype=torch.int32) - x.int()).gather(1, first)

    first_block = before(begins_full)
    end_block = first_block + place // block_size
    is_full = begins_full.gather(1, first_key.long())
    slot_of_token = torch.where(is_full, end_block * block_size + place % block_size, -1)
    slots = length // block_size * block_size
    full_blocks = Layout(block_size, slot_of_token, _inverse(slot_of_token, slots))
    short_blocks = before(begins) - first_block
    return InPlaceLayout(first_key, full_blocks, first_block, end_block, short_blocks)


def _inverse(slot_of_token: Tensor, slots: int) -> Tensor:
    """The token of each of ``slots`` slots, ``(B, slots)`` int32; -1 for a slot without one."""
    batch, length = slot_of_token.shape
    token = torch.arange(length, dtype=torch.int32, device=slot_of_token.device)
    # Tokens without a slot go to one slot more, which is dropped.
    slot = torch.where(slot_of_token >= 0, slot_of_token, slots).long()
    tokens = torch.full((batch, slots + 1), -1, dtype=torch.int32, device=token.device)
    return tokens.scatter(1, slot, token.repeat(batch, 1))[:, :-1]
