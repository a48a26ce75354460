"""`moba_select`, and the selections that attention and caches are made of.

A *row* is a query that selects: every query, the sum of a group's queries, or the first query of
every tile.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.blocks import TILE, own_block
from flexmoba.checks import (
    GateName,
    check_block_size,
    check_documents,
    check_gate,
    check_queries_and_keys,
    check_topk,
)
from flexmoba.gate.options import Candidates, GateOptions, GateSizes
from flexmoba.gate.scores import block_means, forced_blocks, top_blocks_in_pieces
from flexmoba.runtime import HAS_TRITON, without_autocast
from flexmoba.selection import BlockSelection
from flexmoba.sequence import InPlaceLayout, Layout, Sequences, WindowLayout, lay_out, packing_of

_PAST = Candidates()


def moba_select(
    q: Tensor,
    k: Tensor,
    block_size: int,
    topk: int,
    *,
    is_causal: bool = True,
    gate: GateName = "token",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Picks, for every query token and head, the blocks of keys that it attends to.

    The gate of arXiv 2502.13189, Sec. 2.2 (Eq. 5 and 6). A block's key is the mean of its keys,
    accumulated in float32 and rounded to the keys' dtype; its score is the inner product with the
    query, accumulated in float32 (both in float64 for float64 inputs), unscaled. If causal, the
    query's own block is always selected and counts towards ``topk``, and the candidates for the
    rest are the blocks before it. Of equal scores the more recent block wins; NaN is the highest.
    No gradient flows through the selection.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64. Query ``i`` stands
            at position ``i + Lk - Lq`` among the keys.
        k: Keys, ``(B, Hkv, Lk, D)``, of the same dtype, where ``Hkv`` divides ``Hq`` and
            ``Lq <= Lk``.
        block_size: Keys in a block, at least 1. The last block may be shorter.
        topk: Blocks to select, the own block included, at least 1.
        is_causal: Whether only the own block and those before it may be selected. If not, every
            block is a candidate and the own block is not forced.
        gate: Whose scores choose. ``"token"``: those of each query and head, as in the paper.
            ``"group"``: the query heads of a KV head share a choice, by the sum of their scores.
            ``"tile"``: 128 queries in a row share, in each head, the choice of their first one;
            tiles begin at multiples of 128, which must divide ``block_size`` and ``Lk - Lq``.
        sink_blocks: First blocks that every query selects, counted in ``topk``.
        local_blocks: Blocks right before the own one that every query selects, likewise.
        cu_seqlens: Boundaries of packed documents, as in `flex_moba`. Indices then count the
            blocks of a row in order, over all its documents.
        document_ids: As in `flex_moba`; indices as with ``cu_seqlens``.
        key_padding_mask: As in `flex_moba`. Blocks count the real tokens of a row.

    Returns:
        Block indices, int32 ``(B, Hq, Lq, topk)``: the own block first (if causal), then local
        blocks from the nearest on, sinks, and the others by descending score; -1 where there is no
        such block. Padding has -1 alone.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Shapes, dtypes or devices do not fit, or a size is not positive.
        NotImplementedError: Documents or padding with fewer queries than keys; ``gate="tile"``
            where tiles do not divide the blocks or begin before the queries.

    Examples:
        >>> import torch
        >>> from flexmoba import moba_select
        >>> k = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
        >>> k = k.view(1, 1, 5, 2)
        >>> q = torch.tensor([3.0, 1.0]).expand(1, 1, 5, 2)
        >>> moba_select(q, k, block_size=2, topk=2)[0, 0].tolist()
        [[0, -1], [0, -1], [1, 0], [1, 0], [2, 0]]
    """
    check_queries_and_keys(q, k)
    check_block_size(block_size)
    check_topk(topk)
    offset = k.shape[2] - q.shape[2]
    check_gate(gate, sink_blocks, local_blocks, offset, block_size, topk, is_causal=is_causal)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    options = GateOptions(gate, sink_blocks, local_blocks)
    layout: Sequences = Layout(block_size)
    if q.numel() > 0:
        packing = packing_of(k.shape[2], cu_seqlens, document_ids)
        layout = lay_out(
            *(k.shape[2], block_size, packing, key_padding_mask),
            is_causal=is_causal,
            stride=options.stride,
        )
    if isinstance(layout, InPlaceLayout):
        return _select_in_place(q, k, layout, topk, options)
    assert isinstance(layout, Layout)  # windows are of full attention
    q, k = layout.spread(q.detach()), layout.spread(k.detach())
    count = topk - 1 if is_causal else topk
    selection = _select_in_layout(q, k, layout, count, options, is_causal=is_causal)
    selection = expand_rows(selection, q.shape[1], q.shape[2], options)
    if is_causal:
        own = own_block(q.shape[2], k.shape[2], layout.block_size, q.device)
        selection = torch.cat([own.expand(q.shape[:3])[..., None], selection], dim=-1)
    return layout.collect_selection(selection)


def select_for_attention(
    q: Tensor,
    k: Tensor,
    layout: Sequences,
    topk: int,
    gate: GateOptions,
    *,
    is_causal: bool,
    is_full: bool,
    per_tile: bool = False,
) -> BlockSelection | None:
    """The blocks that each query attends to, beside its own block; None for full attention.

    Args:
        q: Queries in the layout, ``(B, Hq, Lq, D)``.
        k: Keys in the layout, ``(B, Hkv, Lk, D)``.
        layout: The layout of both, from `lay_out`.
        topk: Blocks that each query attends to, its own block included.
        gate: Its options.
        is_causal: Whether a query attends to its own block and to past blocks alone.
        is_full: Whether no sequence has more than ``topk`` blocks.
        per_tile: Whether to leave the selection of ``gate="tile"`` as one row for each tile, if
            the layout's blocks consist of full tiles.
    """
    if isinstance(layout, WindowLayout):
        return None
    if isinstance(layout, InPlaceLayout):
        selected = _select_full_blocks(q, k, layout, topk - 1, gate)
        return BlockSelection(selected, layout.full_blocks.block_size)
    count = topk - 1 if is_causal else topk
    if is_full:
        if layout.first_block is None and layout.end_block is None:
            return None
        # All blocks of a sequence, which needs no scores.
        gate = gate._replace(sink_blocks=count, local_blocks=0)
    selected = _select_in_layout(q, k, layout, count, gate, is_causal=is_causal)
    per_tile = per_tile and layout.block_size % TILE == 0
    if not per_tile:
        selected = expand_rows(selected, q.shape[1], q.shape[2], gate)
    keys_of_block = layout.keys_of_block_and_head(k.shape[1])
    return BlockSelection(selected, layout.block_size, None, keys_of_block, per_tile)


def _select_in_layout(
    q: Tensor, k: Tensor, layout: Layout, count: int, gate: GateOptions, *, is_causal: bool
) -> Tensor:
    """``count`` candidates of each row of the gate."""
    sizes = GateSizes(layout.block_size, count, k.shape[2] - q.shape[2], is_causal)
    candidates = Candidates(layout.first_block, layout.end_block, layout.keys_of_block)
    return select_rows(q, k, sizes, gate, candidates)


def _select_full_blocks(
    q: Tensor, k: Tensor, layout: InPlaceLayout, count: int, gate: GateOptions
) -> Tensor:
    """``count`` full blocks of each query's document, before its own block."""
    full_blocks = layout.full_blocks
    keys = full_blocks.spread(k.detach())
    sizes = GateSizes(full_blocks.block_size, count, keys.shape[2] - q.shape[2], is_causal=True)
    candidates = Candidates(layout.first_block, layout.end_block)
    selected = select_rows(q, keys, sizes, gate, candidates)
    return expand_rows(selected, q.shape[1], q.shape[2], gate)


def _select_in_place(
    q: Tensor, k: Tensor, layout: InPlaceLayout, topk: int, gate: GateOptions
) -> Tensor:
    """`moba_select` of documents that stay in place, whose blocks count the short ones too."""
    shift = layout.short_blocks[:, None, :, None]
    own = layout.end_block[:, None, :, None] + shift
    past = _select_full_blocks(q, k, layout, topk - 1, gate)
    past = torch.where(past >= 0, past + shift, -1)
    return torch.cat([own.expand(*q.shape[:3], 1), past], dim=-1)


def select_rows(
    q: Tensor, k: Tensor, sizes: GateSizes, gate: GateOptions, candidates: Candidates = _PAST
) -> Tensor:
    """The candidates that each row selects, ``(B, Hq or Hkv, rows, width)`` int32."""
    rows = gate_rows(q, k.shape[1], gate)
    first, end = (
        x if x is None else x[:, :: gate.stride].contiguous()
        for x in (candidates.first, candidates.end)
    )
    block_size, count, offset, is_causal = sizes
    selected: Tensor = _select(
        *(rows, k.detach(), first, end, candidates.keys_of_block),
        *(offset, block_size, count, *gate, is_causal),
    )
    return selected


def gate_rows(q: Tensor, kv_heads: int, gate: GateOptions) -> Tensor:
    """The rows that select: every query, the sum of every group, or the first of every tile."""
    q = q.detach()
    if gate.per == "group":  # a sum of scores is the score of the sum
        precise = torch.promote_types(q.dtype, torch.float32)
        q = rearrange(q, "b (h g) l d -> b h g l d", h=kv_heads).sum(2, dtype=precise)
    return q[:, :, :: gate.stride]


def expand_rows(
    selected: Tensor, heads: int, q_len: int, gate: GateOptions, *, first_query: int = 0
) -> Tensor:
    """The selection of rows for every query; ``first_query`` is the first one's place in a tile."""
    if gate.per == "group":
        group = heads // selected.shape[1]
        selected = selected.repeat_interleave(group, 1, output_size=heads)
    if gate.per == "tile":
        tiles = selected.shape[2]
        selected = selected.repeat_interleave(TILE, 2, output_size=tiles * TILE)
        selected = selected[:, :, first_query : first_query + q_len]
    return selected


# Opaque to compilers: one implementation each for CUDA and other devices, the same inside
# torch.compile and outside, and its result is a real buffer, as a mask_mod needs. The arguments are
# flat because the schema of an operator has no tuples.
@torch.library.custom_op("flexmoba::select", mutates_args=())
@without_autocast
def _select(
    rows: Tensor,
    k: Tensor,
    first_block: Tensor | None,
    end_block: Tensor | None,
    keys_of_block: Tensor | None,
    offset: int,
    block_size: int,
    count: int,
    per: str,
    sink_blocks: int,
    local_blocks: int,
    is_causal: bool,
) -> Tensor:
    sizes = GateSizes(block_size, count, offset, is_causal)
    gate = GateOptions(per, sink_blocks, local_blocks)
    means = block_means(k, block_size, keys_of_block)
    return select_by_means(rows, means, sizes, gate, Candidates(first_block, end_block))


@_select.register_fake
def _(rows: Tensor, *arguments: Any) -> Tensor:
    *_, offset, block_size, count, per, sink_blocks, local_blocks, is_causal = arguments
    sizes = GateSizes(block_size, count, offset, is_causal)
    width = sizes.width(GateOptions(per, sink_blocks, local_blocks))
    return rows.new_empty((*rows.shape[:3], width), dtype=torch.int32)


def select_by_means(
    rows: Tensor,
    means: Tensor,
    sizes: GateSizes,
    gate: GateOptions,
    candidates: Candidates = _PAST,
) -> Tensor:
    """The selection of rows given the mean keys.

    Args:
        rows: ``(B, Hq or Hkv, rows, D)``, from `gate_rows`. Row ``i`` is at position
            ``sizes.offset + i * gate.stride``.
        means: ``(B, Hkv, blocks, D)``.
        sizes: Sizes.
        gate: Options.
        candidates: The candidates of rows, ``(B, rows)``.

    Returns:
        Block indices, ``(B, Hq or Hkv, rows, width)`` int32: local blocks, sinks, then the others
        by descending score; -1 for none.
    """
    n_blocks, n_rows = means.shape[2], rows.shape[2]
    position = sizes.offset + torch.arange(n_rows, device=rows.device)[None] * gate.stride
    if candidates.end is not None:
        end = candidates.end
    elif sizes.is_causal:
        end = position // sizes.block_size
    else:
        end = torch.full_like(position, n_blocks)
    first = position.new_zeros(1, 1) if candidates.first is None else candidates.first
    forced = forced_blocks(first, end, gate)
    scored = sizes.scored(gate)
    if scored == 0 or rows.numel() == 0 or n_blocks == 0:
        best = rows.new_full((*rows.shape[:3], scored), -1, dtype=torch.int32)
    elif _has_kernel(rows, scored):
        from flexmoba.gate.kernel import select_on_cuda

        best = select_on_cuda(rows, means, sizes, gate, candidates)
    else:
        first, end = first + gate.sink_blocks, end - gate.local_blocks
        best = top_blocks_in_pieces(rows, means, first, end, scored)
    if forced is None:
        return best
    return torch.cat([forced.expand(best.shape[0], best.shape[1], -1, -1), best], dim=-1)


def _has_kernel(rows: Tensor, count: int) -> bool:
    if not rows.is_cuda or rows.dtype == torch.float64 or not HAS_TRITON:
        return False
    from flexmoba.gate.kernel import MAX_COUNT, MAX_HEAD_DIM

    return count <= MAX_COUNT and rows.shape[-1] <= MAX_HEAD_DIM
