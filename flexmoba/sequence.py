"""Sequences within a row: packed documents and padding.

Every sequence has blocks of its own, which begin at its first token. In a `Layout` the tokens move
to slots where they stand in whole blocks: a row of slots is then a sequence like any other, but for
which blocks a query may choose. Where that would take many more slots than there are tokens, as for
documents shorter than a block, tokens stay `InPlace` and full blocks of keys alone are copied.
Only integers are made here. Nothing waits for the device but the count of ``document_ids``.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.checks import check_longest, values_readable
from flexmoba.merge import dispatch

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# Slots of a layout for each token, beyond which documents stay in place. On an H100, at 64K tokens,
# the layout takes more memory from there on, and more time from about three on.
_MOST_SLOTS = 2


class Layout(NamedTuple):
    """Where every token goes. Letters: S slots of a row.

    Attributes:
        slot_of_token: ``(B, L)`` int32, -1 for padding.
        token_of_slot: ``(B, S)`` int32, -1 for a slot that stays empty.
        block_size: Keys in a block, no more than a row has.
        first_block: ``(B, S)`` int32, the first block of each slot's document; None if that is
            block 0 for all.
        end_block: ``(B, S)`` int32, the block after the document's last one; None if causal, where
            no query sees so far.
        keys_of_block: ``(B, S / block_size)`` int32, how many tokens stand in each block; None if
            causal.
    """

    slot_of_token: Tensor
    token_of_slot: Tensor
    block_size: int
    first_block: Tensor | None = None
    end_block: Tensor | None = None
    keys_of_block: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """Tokens ``(B, H, L, D)`` to slots ``(B, H, S, D)``, zeros where one stays empty."""
        return _move(x, self.token_of_slot, self.slot_of_token)

    def collect(self, x: Tensor) -> Tensor:
        """Slots ``(B, H, S, D)`` to tokens ``(B, H, L, D)``, zeros for padding."""
        return _move(x, self.slot_of_token, self.token_of_slot)

    def spread_selection(self, selection: Tensor) -> Tensor:
        """A selection of tokens as one of slots, less the blocks of other documents."""
        moved = _move_selection(selection, self.token_of_slot)
        if self.first_block is not None:
            moved = torch.where(moved >= self.first_block[:, None, :, None], moved, -1)
        if self.end_block is not None:
            moved = torch.where(moved < self.end_block[:, None, :, None], moved, -1)
        return moved

    def collect_selection(self, selection: Tensor) -> Tensor:
        """A selection of slots as one of tokens, -1 for padding."""
        return _move_selection(selection, self.slot_of_token)

    def is_padding(self) -> Tensor:
        """Which tokens have no slot, ``(B, 1, L)``."""
        return (self.slot_of_token < 0)[:, None]


class InPlace(NamedTuple):
    """Packed documents whose tokens stay where they are; causal only.

    A query attends to its own block as a window of the row, from the block's first key on, and to
    past blocks, which are full, by their copies.

    Attributes:
        first_key: ``(B, L)`` int32, the first key of each token's own block.
        full_blocks: Moves keys to the copies of full blocks.
        first_block: ``(B, L)`` int32, the first full block of each token's document.
        end_block: ``(B, L)`` int32, the full block after the last one before the own block.
        other_blocks: ``(B, L)`` int32, how many blocks before the document are not full: what is
            added to a full block's index where the blocks of a row are counted in order.
    """

    first_key: Tensor
    full_blocks: Layout
    first_block: Tensor
    end_block: Tensor
    other_blocks: Tensor


class Packing(NamedTuple):
    """Packed documents as `packing_of` reads them.

    Attributes:
        first_token: ``(B, L)`` ints, the first token of each token's document.
        n_documents: Documents of a row, at most.
        longest: Tokens of a document, at most.
    """

    first_token: Tensor
    n_documents: int
    longest: int


def packing_of(
    length: int,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    max_seqlen: int | None = None,
) -> Packing | None:
    """The documents of rows of ``length`` tokens; None if neither tensor is given.

    ``document_ids`` are read, as no shape says how many documents there are; so are ``cu_seqlens``
    on CPU, where reading waits for nothing. Elsewhere ``max_seqlen`` says how long documents are.
    """
    if cu_seqlens is None and document_ids is None:
        return None
    first_token = first_tokens(length, cu_seqlens, document_ids)
    if cu_seqlens is not None:
        longest = length
        if values_readable(cu_seqlens):
            longest = max(1, int(cu_seqlens.diff().max()))
        elif max_seqlen is not None:
            torch._assert_async(
                cu_seqlens.diff().max() <= max_seqlen, "a document is longer than max_seqlen"
            )
            longest = min(max_seqlen, length)
        return Packing(first_token, cu_seqlens.shape[0] - 1, longest)
    token = torch.arange(length, device=first_token.device)
    sizes = [(first_token == token).sum(1).max(), (token - first_token).max() + 1]
    n_documents, longest = torch.stack(sizes).tolist()
    check_longest(longest, max_seqlen)
    return Packing(first_token, n_documents, longest)


def arrange(
    length: int,
    block_size: int,
    packing: Packing | None,
    key_padding_mask: Tensor | None,
    *,
    is_causal: bool,
    stride: int = 1,
) -> Layout | InPlace | None:
    """Where the tokens of each sequence go; None if every row is one sequence.

    Args:
        length: Tokens of a row, at least 1.
        block_size: Keys in a block.
        packing: Documents, or None.
        key_padding_mask: ``(B, L)`` bools, True for real tokens, or None.
        is_causal: Whether queries see only keys at or before their positions.
        stride: Queries that choose together; blocks are whole multiples of it.
    """
    if packing is None and key_padding_mask is None:
        return None
    longest = length if packing is None else packing.longest
    # No longer than a sequence, but queries of two documents never choose together.
    block_size = min(block_size, -(-longest // stride) * stride)
    if packing is None:
        assert key_padding_mask is not None
        return without_padding(key_padding_mask, block_size, is_causal=is_causal)
    # Each document opens at most one block more than its share of the tokens.
    n_blocks = (length + packing.n_documents * (block_size - 1)) // block_size
    n_blocks = min(n_blocks, length)
    if is_causal and stride == 1 and n_blocks * block_size > _MOST_SLOTS * length:
        return _in_place(packing.first_token.int(), block_size)
    return _by_documents(packing.first_token, block_size, n_blocks, is_causal=is_causal)


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

    Of the last three arguments one is given.
    """
    if key_padding_mask is not None:
        return without_padding(key_padding_mask, 1).slot_of_token
    first_token = first_tokens(length, cu_seqlens, document_ids)
    return torch.arange(length, device=first_token.device) - first_token


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
    layout = Layout(slot.int(), token_of_slot, block_size, first_block)
    if is_causal:
        return layout
    ends = torch.nn.functional.pad(first_token.diff(dim=1) != 0, (0, 1), value=True)
    last_token = torch.where(ends, token, length).flip(1).cummin(1).values.flip(1)
    last_block = block.gather(1, last_token.long())
    end_block = torch.zeros_like(own_block).scatter(1, slot, last_block + 1)
    return layout._replace(end_block=end_block, keys_of_block=_keys_of_blocks(layout))


def _keys_of_blocks(layout: Layout) -> Tensor:
    there = layout.token_of_slot >= 0
    return there.view(there.shape[0], -1, layout.block_size).sum(2, dtype=torch.int32)


def _in_place(first_token: Tensor, block_size: int) -> InPlace:
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
    full_blocks = Layout(slot_of_token, _inverse(slot_of_token, slots), block_size)
    return InPlace(first_key, full_blocks, first_block, end_block, before(begins) - first_block)


def without_padding(real: Tensor, block_size: int, *, is_causal: bool = True) -> Layout:
    """The real tokens of every row, ``(B, L)`` bools, one after the other from slot 0 on."""
    slot_of_token = torch.where(real, real.cumsum(1, dtype=torch.int32) - 1, -1)
    length = real.shape[1]
    slots = length if is_causal else -(-length // block_size) * block_size
    layout = Layout(slot_of_token, _inverse(slot_of_token, slots), block_size)
    if is_causal:
        return layout
    end_block = -(-real.sum(1, keepdim=True, dtype=torch.int32) // block_size)
    return layout._replace(
        end_block=end_block.repeat(1, slots), keys_of_block=_keys_of_blocks(layout)
    )


def _inverse(slot_of_token: Tensor, slots: int) -> Tensor:
    """The token of each of ``slots`` slots, ``(B, slots)`` int32; -1 for a slot without one."""
    batch, length = slot_of_token.shape
    token = torch.arange(length, dtype=torch.int32, device=slot_of_token.device)
    # Tokens without a slot go to one slot more, which is dropped.
    slot = torch.where(slot_of_token >= 0, slot_of_token, slots).long()
    tokens = torch.full((batch, slots + 1), -1, dtype=torch.int32, device=token.device)
    return tokens.scatter(1, slot, token.repeat(batch, 1))[:, :-1]


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
