"""Attention over a selection by the backend in the options."""

import torch
from torch import Tensor

from flexmoba.backends import flex, portable
from flexmoba.backends.dense import (
    dense_attention,
    dense_with_gradients,
    supports_dense,
    supports_dense_gradients,
)
from flexmoba.backends.flex import run_compiled
from flexmoba.backends.fused import fused_attention
from flexmoba.backends.grouped import grouped_attention, supports_grouped
from flexmoba.backends.merge import merge_two
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.portable import portable_attention
from flexmoba.backends.score_mod import ScoreMod, ScoreModifier, score_modifier
from flexmoba.blocks import ceil_div, own_block
from flexmoba.checks import check_selected_blocks
from flexmoba.runtime import values_readable
from flexmoba.selection import BlockSelection
from flexmoba.sequence import InPlaceLayout, Layout, Sequences, WindowLayout

# Bounds of the block size, in keys, with which the portable backend computes windows.
_SHORTEST_WINDOW_BLOCK, _LONGEST_WINDOW_BLOCK = 64, 512


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    layout: Sequences,
    options: AttentionOptions,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of every query to its selected blocks and, if causal, its own block.

    Args:
        q: Queries in the layout, ``(B, Hq, Lq, D)``.
        k: Keys in the layout, ``(B, Hkv, Lk, D)``.
        v: Values in the layout, ``(B, Hkv, Lk, Dv)``.
        selection: The selection of a gate; None for full attention.
        layout: The layout of q, k, v and the selection.
        options: The backend and its options.
        score_mod: A function of every score, or None.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32 (float64 for float64 inputs).
    """
    if isinstance(layout, WindowLayout):
        modifier = score_modifier(score_mod, q, k, None)
        return window_attention(q, k, v, layout.first_key, layout.longest, options, modifier)
    if isinstance(layout, InPlaceLayout):
        assert selection is not None
        return in_place_attention(q, k, v, selection, layout, options, score_mod)
    modifier = score_modifier(score_mod, q, k, layout.token_of_slot)
    if selection is None:
        return full_attention(q, k, v, options, modifier)
    if selection.per_tile:
        return flex.tile_gate_attention(q, k, v, selection, options, modifier)
    return block_attention(q, k, v, selection, options, modifier)


def attend_without_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None,
    layout: Sequences,
    options: AttentionOptions,
    score_mod: ScoreMod | None,
) -> Tensor:
    """Computes the output of `attend` for a caller that does not use the log-sum-exp.

    The arguments are those of `attend`. torch's fastest kernels of full attention have no gradient
    of the log-sum-exp, so they compute calls with gradients only here.
    """
    if (
        selection is None
        and isinstance(layout, Layout)
        and supports_dense_gradients(q, k, v, options, has_score_mod=score_mod is not None)
    ):
        return dense_with_gradients(q, k, v, options)
    return attend(q, k, v, selection, layout, options, score_mod)[0]


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    layout: Layout | InPlaceLayout,
    options: AttentionOptions,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Computes `attend` for a selection that lists the own block in any column, or not at all.

    Args:
        q: Queries in the layout, ``(B, Hq, Lq, D)``.
        k: Keys in the layout, ``(B, Hkv, Lk, D)``.
        v: Values in the layout, ``(B, Hkv, Lk, Dv)``.
        selected: ``(B, Hq or Hkv, L, topk)`` int32 or int64, the block indices of each token, as
            in `selected_attention`.
        layout: The layout of q, k and v.
        options: The backend and its options.
        score_mod: A function of every score, or None.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``, as `attend`.
    """
    if selected.shape[1] != q.shape[1]:
        is_grouped = options.impl == "fused" and supports_grouped(q, k, v)
        if is_grouped and isinstance(layout, Layout):
            selected = layout.spread_selection(_existing(selected, k, layout.block_size))
            numbers = layout.block_size, options.scale, options.is_causal
            return grouped_attention(q, k, v, selected, *numbers)
        group = q.shape[1] // selected.shape[1]
        selected = selected.repeat_interleave(group, 1, output_size=q.shape[1])
    if isinstance(layout, InPlaceLayout):
        selection = _full_blocks_of(selected, layout)
        return in_place_attention(q, k, v, selection, layout, options, score_mod)
    modifier = score_modifier(score_mod, q, k, layout.token_of_slot)
    selected = layout.spread_selection(_existing(selected, k, layout.block_size))
    if layout.block_size >= k.shape[2] and layout.keys_of_block is None:  # one block
        out, lse = full_attention(q, k, v, options, modifier)
        is_selected = (selected == 0).any(-1)
        out = torch.where(is_selected[..., None], out, 0.0)
        return out, torch.where(is_selected, lse, float("-inf"))
    own: Tensor | None = None
    if options.is_causal:
        own_index = own_block(q.shape[2], k.shape[2], layout.block_size, q.device)[:, None]
        own = (selected == own_index).any(-1)
        selected = torch.where(selected < own_index, selected, -1)
    keys_of_block = layout.keys_of_block_and_head(k.shape[1])
    selection = BlockSelection(selected, layout.block_size, own, keys_of_block)
    return block_attention(q, k, v, selection, options, modifier)


def _existing(selected: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Removes indices that are too large, since values are not checked on a GPU.

    They would name another head's block.
    """
    return torch.where(selected < ceil_div(k.shape[2], block_size), selected, -1).int()


def check_selected_values(selected: Tensor, kv_len: int, layout: Layout | InPlaceLayout) -> None:
    """Raises unless every index is a block of the layout or -1; checks only on CPU."""
    if not values_readable(selected):
        return
    if isinstance(layout, InPlaceLayout):
        n_blocks = int((layout.end_block + layout.short_blocks).max()) + 1
    else:
        n_blocks = ceil_div(kv_len, layout.block_size)
    check_selected_blocks(selected, n_blocks)


def _full_blocks_of(selected: Tensor, layout: InPlaceLayout) -> BlockSelection:
    """Converts indices that count all blocks of a row to indices of full blocks."""
    shift = layout.short_blocks[:, None, :, None]
    first = layout.first_block[:, None, :, None] + shift
    own = layout.end_block[:, None, :, None] + shift
    is_past = (selected >= first) & (selected < own)
    past = torch.where(is_past, selected - shift, -1).int()
    return BlockSelection(past, layout.full_blocks.block_size, (selected == own).any(-1))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of every query to its routed blocks and, if causal, its own block.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        selection: The blocks of each query.
        options: The backend and its options.
        modifier: A ``score_mod`` and the indices that it receives, or None.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32 (float64 for float64 inputs).
    """
    if options.impl == "masked":
        return flex.masked_attention(q, k, v, selection, options, modifier)
    if options.impl == "fused":
        return fused_attention(q, k, v, selection, options)
    if options.impl == "routed":
        return flex.routed_attention(q, k, v, selection, options, modifier)
    return portable_attention(q, k, v, selection, options, modifier)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes full attention; the arguments and results are those of `block_attention`."""
    if supports_dense(q, k, v, options, has_score_mod=modifier is not None):
        return dense_attention(q, k, v, options)
    if options.impl == "portable":
        return portable.full_attention(q, k, v, options, modifier)
    return flex.full_attention(q, k, v, options, modifier)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    longest: int,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes causal attention within a window of keys for each query.

    The window of a query begins at its first key and ends at the query's own position. Time and
    memory are proportional to the number of query-key pairs in the windows.

    Args:
        q: Queries, ``(B, Hq, L, D)``.
        k: Keys, ``(B, Hkv, L, D)``.
        v: Values, ``(B, Hkv, L, Dv)``.
        first_key: ``(B, L)`` int32, the first key of each query; it never decreases along a row.
        longest: An upper bound of the number of keys in a window.
        options: The backend and its options.
        modifier: A ``score_mod`` and the indices that it receives, or None.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)``.
    """
    length = k.shape[2]
    # Each value compiles again. Powers of two keep the number of values small.
    longest = min(length, 1 << (longest - 1).bit_length())
    if options.impl != "portable":
        return flex.window_attention(q, k, v, first_key, longest, options, modifier)
    size = min(length, max(_SHORTEST_WINDOW_BLOCK, min(_LONGEST_WINDOW_BLOCK, longest)))
    own = own_block(length, length, size, q.device)[:, None]
    past = own - 1 - torch.arange(ceil_div(longest - 1, size), device=q.device)
    past = torch.where(past * size + size > first_key[..., None], past, -1).int()
    selection = BlockSelection(past[:, None].expand(-1, q.shape[1], -1, -1), size)
    return portable_attention(q, k, v, selection, options, modifier, first_key=first_key)


def in_place_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    layout: InPlaceLayout,
    options: AttentionOptions,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Computes `block_attention` for documents whose tokens stay in place.

    The own block is a window of the row, and the past blocks are copies of full blocks. The two
    partial outputs are merged by their log-sum-exps.

    Args:
        q: Queries, ``(B, Hq, L, D)``.
        k: Keys, ``(B, Hkv, L, D)``.
        v: Values, ``(B, Hkv, L, Dv)``.
        selection: The blocks of each query, as indices of full blocks.
        layout: The layout of the documents.
        options: The backend and its options.
        score_mod: A function of every score, or None.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)``.
    """
    modifier = score_modifier(score_mod, q, k, None)
    full_blocks = layout.full_blocks
    out, lse = window_attention(
        q, k, v, layout.first_key, full_blocks.block_size, options, modifier
    )
    if selection.own is not None:
        out = torch.where(selection.own[..., None], out, 0.0)
        lse = torch.where(selection.own, lse, float("-inf"))
    if selection.routed.shape[-1] == 0:
        return out, lse
    if modifier is not None:
        assert full_blocks.token_of_slot is not None
        position = full_blocks.token_of_slot.clamp(min=0)[:, None].expand(-1, k.shape[1], -1)
        modifier = modifier._replace(key_position=position, is_remapped=True)
    k, v = full_blocks.spread(k), full_blocks.spread(v)
    past_out, past_lse = block_attention(
        *(q, k, v, selection._replace(own=None), options._replace(is_causal=False), modifier)
    )
    if options.impl == "portable":
        return merge_two(out, lse, past_out, past_lse)
    # Compiled, the merge is one pass over memory.
    return run_compiled(merge_two, out, lse, past_out, past_lse, kernel_options=None)
