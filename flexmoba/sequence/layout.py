"""Layouts: indices that map the tokens of each sequence to blocks.

A `Layout` moves the tokens to slots, so that every sequence begins at the start of a block. A row
of slots is then handled like one sequence, in which each query has candidate blocks of its sequence
only. If there would be many more slots than tokens, as for documents shorter than a block, the
tokens stay in place and only full blocks of keys are copied (`InPlaceLayout`). In full attention
within documents, every query attends to a window of keys (`WindowLayout`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.rows import copy_rows
from flexmoba.runtime import HAS_TRITON


class Layout(NamedTuple):
    """The slot of every token; a row has ``S`` slots.

    Attributes:
        block_size: Keys in a block.
        slot_of_token: ``(B, L)`` int32, -1 for padding; None if every row is one sequence, whose
            tokens do not move.
        token_of_slot: ``(B, S)`` int32, -1 for an empty slot; None if tokens do not move.
        first_block: ``(B, S)`` int32, the first block of each slot's document; None if it is
            block 0.
        end_block: ``(B, S)`` int32, the block after the last block of each slot's document; None
            in causal attention, which does not need it.
        keys_of_block: ``(B, S / block_size)`` int32, the number of tokens in each block; None in
            causal attention.
    """

    block_size: int
    slot_of_token: Tensor | None = None
    token_of_slot: Tensor | None = None
    first_block: Tensor | None = None
    end_block: Tensor | None = None
    keys_of_block: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """Moves tokens ``(B, H, L, D)`` to slots ``(B, H, S, D)``, zeros in empty slots."""
        if self.token_of_slot is None or self.slot_of_token is None:
            return x
        return _move(x, self.token_of_slot, self.slot_of_token)

    def collect(self, x: Tensor) -> Tensor:
        """Moves slots ``(B, H, S, D)`` to tokens ``(B, H, L, D)``, zeros for padding."""
        if self.token_of_slot is None or self.slot_of_token is None:
            return x
        return _move(x, self.slot_of_token, self.token_of_slot)

    def collect_results(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Moves output and log-sum-exp from slots to tokens, zeros and -inf for padding."""
        if self.slot_of_token is None:
            return out, lse
        out = self.collect(out)
        if lse is None:
            return out, None
        lse = self.collect(lse[..., None])[..., 0]
        return out, lse.masked_fill((self.slot_of_token < 0)[:, None], float("-inf"))

    def keys_of_block_and_head(self, kv_heads: int) -> Tensor | None:
        """Returns the number of tokens in each block, ``(B, Hkv, blocks)`` int32.

        None means that all blocks but the last one are full.
        """
        if self.keys_of_block is None:
            return None
        return self.keys_of_block[:, None].expand(-1, kv_heads, -1)

    def spread_selection(self, selection: Tensor) -> Tensor:
        """Moves a selection from tokens to slots, and drops the blocks of other documents."""
        if self.token_of_slot is None:
            return selection
        moved = _move_selection(selection, self.token_of_slot)
        if self.first_block is not None:
            moved = torch.where(moved >= self.first_block[:, None, :, None], moved, -1)
        if self.end_block is not None:
            moved = torch.where(moved < self.end_block[:, None, :, None], moved, -1)
        return moved

    def collect_selection(self, selection: Tensor) -> Tensor:
        """Moves a selection from slots to tokens, -1 for padding."""
        if self.slot_of_token is None:
            return selection
        return _move_selection(selection, self.slot_of_token)


class InPlaceLayout(NamedTuple):
    """Packed documents whose tokens stay in place, for causal attention.

    A query attends to its own block as a window of the row that begins at the block's first key.
    Its past blocks are full, and it attends to copies of them.

    Attributes:
        first_key: ``(B, L)`` int32, the first key of each token's own block.
        full_blocks: The layout that copies the full blocks of keys.
        first_block: ``(B, L)`` int32, the first full block of each token's document.
        end_block: ``(B, L)`` int32, one more than the last full block before the own block.
        short_blocks: ``(B, L)`` int32, the number of short blocks before each token's document.
            The index of a full block plus this number is its index among all blocks of the row.
    """

    first_key: Tensor
    full_blocks: Layout
    first_block: Tensor
    end_block: Tensor
    short_blocks: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """Returns ``x``, because tokens stay in place."""
        return x

    def collect_results(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns both, because tokens stay in place."""
        return out, lse


class WindowLayout(NamedTuple):
    """Packed documents under causal full attention: each query attends to a window of the row.

    Attributes:
        first_key: ``(B, L)`` int32, the first token of each token's document.
        longest: An upper bound of the tokens of a document.
    """

    first_key: Tensor
    longest: int

    def spread(self, x: Tensor) -> Tensor:
        """Returns ``x``, because tokens stay in place."""
        return x

    def collect_results(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns both, because tokens stay in place."""
        return out, lse


Sequences = Layout | InPlaceLayout | WindowLayout


def _move_selection(selection: Tensor, source: Tensor) -> Tensor:
    index = source.clamp(min=0).long()[:, None, :, None]
    moved = selection.gather(2, index.expand(-1, selection.shape[1], -1, selection.shape[3]))
    return moved.masked_fill((source < 0)[:, None, :, None], -1)


def _move(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Returns rows of ``x (B, H, N, D)`` by ``source (B, M)``; ``target (B, N)`` is its inverse."""
    if x.is_cuda and HAS_TRITON:
        moved: Tensor = _move_rows(x, source, target)
        return moved
    batch, heads, length, dim = x.shape
    row = torch.arange(batch * heads, dtype=torch.int32, device=x.device).view(batch, heads, 1)

    def flat(index: Tensor, stride: int) -> Tensor:
        return torch.where(index[:, None] >= 0, index[:, None] + row * stride, -1).flatten()

    source_of_row, row_of_source = flat(source, length), flat(target, source.shape[1])
    moved = copy_rows(x.reshape(-1, dim), source_of_row, row_of_source[:, None])
    return moved.view(batch, heads, source.shape[1], dim)


@torch.library.custom_op("flexmoba::move_rows", mutates_args=())
def _move_rows(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    from flexmoba.sequence.kernel import move_on_cuda

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
