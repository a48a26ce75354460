"""Sequences within a row: packed documents and padding, laid out anew.

Every document's tokens move to slots so that its first one begins a block, and padding goes: a
row of such slots is then a sequence like any other, but for which blocks a query may choose.
Only integers are made here, and where shapes follow from shapes nothing waits for the device.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.merge import dispatch

_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Layout(NamedTuple):
    """Where every token goes. Letters: S slots of a row.

    Attributes:
        slot_of_token: ``(B, L)`` int32, -1 for padding.
        token_of_slot: ``(B, S)`` int32, -1 for a slot that stays empty.
        first_block: ``(B, S)`` int32, the first block of each slot's document; None if that is
            block 0 for all.
        block_size: Keys in a block, no more than a row has.
    """

    slot_of_token: Tensor
    token_of_slot: Tensor
    first_block: Tensor | None
    block_size: int

    def spread(self, x: Tensor) -> Tensor:
        """Tokens ``(B, H, L, D)`` to slots ``(B, H, S, D)``, zeros where one stays empty."""
        return _move(x, self.token_of_slot, self.slot_of_token)

    def collect(self, x: Tensor) -> Tensor:
        """Slots ``(B, H, S, D)`` to tokens ``(B, H, L, D)``, zeros for padding."""
        return _move(x, self.slot_of_token, self.token_of_slot)

    def spread_selection(self, selection: Tensor) -> Tensor:
        """A selection of tokens as one of slots, less the blocks before a slot's document."""
        moved = _move_selection(selection, self.token_of_slot)
        if self.first_block is None:
            return moved
        return torch.where(moved >= self.first_block[:, None, :, None], moved, -1)

    def collect_selection(self, selection: Tensor) -> Tensor:
        """A selection of slots as one of tokens, -1 for padding."""
        return _move_selection(selection, self.slot_of_token)

    def is_padding(self) -> Tensor:
        """Which tokens have no slot, ``(B, 1, L)``."""
        return (self.slot_of_token < 0)[:, None]


def layout_of(
    length: int,
    block_size: int,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Layout | None:
    """The layout that one of the three arguments asks for; None if all of them are None.

    Args:
        length: Tokens of a row, at least 1.
        block_size: Keys in a block.
        cu_seqlens: ``(n + 1,)`` ints, the documents' boundaries in the only row.
        document_ids: ``(B, L)`` ints, another value for every other document.
        key_padding_mask: ``(B, L)`` bools, True for real tokens.
    """
    if cu_seqlens is None and document_ids is None and key_padding_mask is None:
        return None
    if block_size > length:  # a longer one is the same, but would take more slots
        block_size = length
    if key_padding_mask is not None:
        return without_padding(key_padding_mask, block_size)
    first_token = first_tokens(length, cu_seqlens, document_ids)
    most = None  # no shape tells how many documents there are
    if cu_seqlens is not None:
        # Each document opens at most one block more than its share of the tokens.
        most = (length + (cu_seqlens.shape[0] - 1) * (block_size - 1)) // block_size
        most = min(most, length)
    return _by_documents(first_token, block_size, most)


def first_tokens(length: int, cu_seqlens: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """The first token of each token's document, ``(B, L)`` ints; of two arguments one is given."""
    if cu_seqlens is not None:
        token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens, token, right=True) - 1
        return cu_seqlens[document][None]
    assert document_ids is not None
    token = torch.arange(length, device=document_ids.device)
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(starts, token, 0).cummax(1).values


def positions_of(
    length: int,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """The position of each token in its sequence, ``(B, L)`` ints; -1 for padding.

    Of the last three arguments one is given, as in `layout_of`.
    """
    if key_padding_mask is not None:
        return without_padding(key_padding_mask, 1).slot_of_token
    first_token = first_tokens(length, cu_seqlens, document_ids)
    return torch.arange(length, device=first_token.device) - first_token


def _by_documents(first_token: Tensor, block_size: int, n_blocks: int | None) -> Layout:
    """Documents given by the first token of each token's, ``(B, L)``."""
    batch, length = first_token.shape
    token = torch.arange(length, dtype=torch.int32, device=first_token.device)
    place = token - first_token.int()
    block = (place % block_size == 0).cumsum(1, dtype=torch.int32) - 1
    if n_blocks is None:  # reads a value, as no shape tells how many documents there are
        n_blocks = int(block.max()) + 1
    slot = block * block_size + place % block_size
    slots = torch.arange(n_blocks * block_size, dtype=torch.int32, device=token.device)
    token_of_slot = torch.full_like(slots, -1).repeat(batch, 1)
    token_of_slot = token_of_slot.scatter(1, slot.long(), token.repeat(batch, 1))
    first_block = (slots // block_size).repeat(batch, 1)
    first_block = first_block.scatter(1, slot.long(), block - place // block_size)
    return Layout(slot, token_of_slot, first_block, block_size)


def without_padding(real: Tensor, block_size: int) -> Layout:
    """The real tokens of every row, ``(B, L)`` bools, one after the other from slot 0 on."""
    token = torch.arange(real.shape[1], dtype=torch.int32, device=real.device).expand(real.shape)
    slot_of_token = torch.where(real, real.cumsum(1, dtype=torch.int32) - 1, -1)
    # Padding goes to one slot more, which is dropped.
    slot = torch.where(real, slot_of_token, real.shape[1]).long()
    token_of_slot = token.new_full((real.shape[0], real.shape[1] + 1), -1).scatter(1, slot, token)
    return Layout(slot_of_token, token_of_slot[:, :-1], None, block_size)


def _move_selection(selection: Tensor, source: Tensor) -> Tensor:
    index = source.clamp(min=0).long()[:, None, :, None]
    moved = selection.gather(2, index.expand(-1, selection.shape[1], -1, selection.shape[3]))
    return moved.masked_fill((source < 0)[:, None, :, None], -1)


def _move(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """``x (B, H, N, D)`` by the source ``(B, M)`` of each place; ``target (B, N)`` inverts it."""
    if x.is_cuda and _HAS_TRITON:
        moved: Tensor = _move_rows(x, source, target)
        return moved
    batch, heads, length, dim = x.shape
    row = torch.arange(batch * heads, dtype=torch.int32, device=x.device).view(batch, heads, 1)

    def flat(index: Tensor, stride: int) -> Tensor:
        return torch.where(index[:, None] >= 0, index[:, None] + row * stride, -1).flatten()

    there, back = flat(source, length), flat(target, source.shape[1])
    moved = dispatch(x.reshape(-1, dim), there, back[:, None])
    return moved.view(batch, heads, source.shape[1], dim)


@torch.library.custom_op("flexmoba::move_rows", mutates_args=())
def _move_rows(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    from flexmoba.move_kernel import move_on_cuda

    return move_on_cuda(x, source)


@_move_rows.register_fake
def _(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], source.shape[1], x.shape[3])


def _keep_indices(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _move_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    source, target = ctx.saved_tensors
    return _move_rows(grad, target, source), None, None


_move_rows.register_autograd(_move_back, setup_context=_keep_indices)
