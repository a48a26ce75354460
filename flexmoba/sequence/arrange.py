"""Selects a layout for the sequences of every row, and computes its indices.

None of these functions waits for the device.
"""

import torch
from torch import Tensor

from flexmoba.blocks import ceil_div
from flexmoba.sequence.documents import Packing, positions_of_real_tokens
from flexmoba.sequence.layout import InPlaceLayout, Layout, Sequences, WindowLayout

# A `Layout` may have at most this many slots for each token; otherwise documents stay in place. On
# an H100, at 64K tokens, more slots take more memory than documents in place, and from about three
# slots for each token on also more time.
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
    """Returns a layout of the sequences of every row.

    Args:
        length: Tokens of a row, at least 1.
        block_size: Keys in a block.
        packing: The documents, or None.
        key_padding_mask: ``(B, L)`` bools, True for real tokens, or None.
        is_causal: Whether queries attend only to keys at or before their positions.
        is_full: Whether queries attend to all blocks of their sequence.
        stride: Number of queries that share a selection. Block sizes are multiples of it.
    """
    if packing is None and key_padding_mask is None:
        return Layout(block_size)
    if packing is not None and is_causal and is_full:
        first_key = packing.first_token.int()
        return WindowLayout(first_key, packing.longest)
    longest = length if packing is None else packing.longest
    # A block longer than a sequence would only add empty slots. A multiple of the stride keeps the
    # queries of two documents from sharing a selection.
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
    """Returns a layout of the real tokens of every row, ``(B, L)`` bools, from slot 0 on."""
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
    """Returns a layout in which every document begins a block.

    ``first_token (B, L)`` holds the first token of each token's document.
    """
    batch, length = first_token.shape
    token = torch.arange(length, dtype=torch.int32, device=first_token.device)
    position = token - first_token.int()
    block = (position % block_size == 0).cumsum(1, dtype=torch.int32) - 1
    slot = (block * block_size + position % block_size).long()
    slots = torch.arange(n_blocks * block_size, dtype=torch.int32, device=token.device)
    token_of_slot = torch.full_like(slots, -1).repeat(batch, 1)
    token_of_slot = token_of_slot.scatter(1, slot, token.repeat(batch, 1))
    own_block = (slots // block_size).repeat(batch, 1)
    first_block = own_block.scatter(1, slot, block - position // block_size)
    layout = Layout(block_size, slot.int(), token_of_slot, first_block)
    if is_causal:
        return layout
    ends = torch.nn.functional.pad(first_token.diff(dim=1) != 0, (0, 1), value=True)
    last_token = torch.where(ends, token, length).flip(1).cummin(1).values.flip(1)
    last_block = block.gather(1, last_token.long())
    end_block = torch.zeros_like(own_block).scatter(1, slot, last_block + 1)
    return layout._replace(end_block=end_block, keys_of_block=_keys_of_blocks(layout))


def _keys_of_blocks(layout: Layout) -> Tensor:
    """Counts the tokens in each block of a layout, ``(B, blocks)`` int32."""
    assert layout.token_of_slot is not None
    occupied = layout.token_of_slot >= 0
    return occupied.view(occupied.shape[0], -1, layout.block_size).sum(2, dtype=torch.int32)


def _in_place(first_token: Tensor, block_size: int) -> InPlaceLayout:
    """Returns a layout of documents whose tokens stay in place.

    ``first_token (B, L)`` int32 holds the first token of each token's document.
    """
    length = first_token.shape[1]
    token = torch.arange(length, dtype=torch.int32, device=first_token.device)
    position = token - first_token
    first_key = token - position % block_size
    begins = first_key == token
    # A block is full if its last key belongs to the same document.
    last = torch.nn.functional.pad(first_token[:, block_size - 1 :], (0, block_size - 1), value=-1)
    begins_full = begins & (last == first_token)
    first = first_token.long()

    def count_before(x: Tensor) -> Tensor:
        """Counts the True values of ``x`` before each token's document."""
        return (x.cumsum(1, dtype=torch.int32) - x.int()).gather(1, first)

    first_block = count_before(begins_full)
    end_block = first_block + position // block_size
    is_full = begins_full.gather(1, first_key.long())
    slot_of_token = torch.where(is_full, end_block * block_size + position % block_size, -1)
    slots = length // block_size * block_size
    full_blocks = Layout(block_size, slot_of_token, _inverse(slot_of_token, slots))
    short_blocks = count_before(begins) - first_block
    return InPlaceLayout(first_key, full_blocks, first_block, end_block, short_blocks)


def _inverse(slot_of_token: Tensor, slots: int) -> Tensor:
    """Returns the token of each of ``slots`` slots, ``(B, slots)`` int32; -1 for an empty slot."""
    batch, length = slot_of_token.shape
    token = torch.arange(length, dtype=torch.int32, device=slot_of_token.device)
    # Tokens without a slot go to an extra slot, which is dropped.
    slot = torch.where(slot_of_token >= 0, slot_of_token, slots).long()
    tokens = torch.full((batch, slots + 1), -1, dtype=torch.int32, device=token.device)
    return tokens.scatter(1, slot, token.repeat(batch, 1))[:, :-1]
