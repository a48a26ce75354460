"""`moba_select`, and selections for the backends and the cache.

A *row* is a query of the gate: each query, the sum of the queries of a group, or the first query of
each tile.
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
    check_gate_block_size,
    check_queries_and_keys,
    check_topk,
)
from flexmoba.gate.options import Candidates, GateOptions, GateSizes
from flexmoba.gate.scores import block_means, forced_blocks, top_blocks_in_pieces
from flexmoba.runtime import HAS_TRITON, is_plain_call, without_autocast
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
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Selects the blocks of keys that every query token and head attends to.

    This is the gate of arXiv 2502.13189, Sec. 2.2 (Eq. 5 and 6). The mean key of a block is the
    mean of its keys, accumulated in float32 and rounded to the dtype of the keys. The score of the
    block is the unscaled inner product of the query and the mean key, accumulated in float32. (For
    float64 inputs, both accumulate in float64.) In causal attention, the own block, which contains
    the query's position, is always selected and counts towards ``topk``, and the blocks before it
    are the candidates for the rest. Of equal scores, the more recent block wins. NaN is the highest
    score. No gradient flows through the selection.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64. Query ``i`` has the
            position ``i + Lk - Lq``.
        k: Keys, ``(B, Hkv, Lk, D)``, in the dtype of q, where ``Hkv`` divides ``Hq`` and
            ``Lq <= Lk``.
        block_size: Keys in a block, at least 1. The last block may be shorter.
        topk: Number of blocks to select, including the own block, at least 1.
        is_causal: Whether only the own block and the blocks before it are selected. If False,
            every block is a candidate, and the own block is not always selected.
        gate: Scores that select the blocks. ``"token"``: the scores of each query token and head,
            as in the paper. ``"group"``: the sums of the scores over the query heads of a KV head,
            which share the selection. ``"tile"``: the scores of the first of 128 consecutive
            queries, which share the selection, for each head. Tiles begin at multiples of 128,
            which must divide ``block_size`` and ``Lk - Lq``.
        gate_block_size: Keys in a sub-block, a divisor of ``block_size``. The gate scores the mean
            key of each sub-block, and the score of a block is the highest score of its sub-blocks.
            By default, a block is its only sub-block, as in the paper.
        sink_blocks: Number of first blocks that are always selected. They count towards ``topk``.
        local_blocks: Number of blocks right before the own block that are always selected. They
            count towards ``topk``.
        cu_seqlens: Boundaries of packed documents, as in `flex_moba`. Block indices then count the
            blocks of all documents of the row, in order.
        document_ids: As in `flex_moba`. Block indices are as with ``cu_seqlens``.
        key_padding_mask: As in `flex_moba`. Blocks contain only the real tokens of a row.

    Returns:
        The selection: block indices, ``(B, Hq, Lq, topk)``, int32, with -1 for none. A row lists
        the own block (if causal), local blocks from the nearest on, sink blocks, and then the
        others by descending score. Rows of padding hold only -1.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, or a value is out of range.
        NotImplementedError: Documents or padding have fewer queries than keys, or with
            ``gate="tile"`` the tiles do not divide the blocks or begin before the queries.

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
    sub_blocks = check_gate_block_size(gate_block_size, block_size)
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask)
    options = GateOptions(gate, sink_blocks, local_blocks, sub_blocks)
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
    assert isinstance(layout, Layout)  # only full attention has windows
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
    """Selects blocks in addition to the own block, as input of a backend.

    Args:
        q: Queries in the layout, ``(B, Hq, Lq, D)``.
        k: Keys in the layout, ``(B, Hkv, Lk, D)``.
        layout: The layout of both, from `lay_out`.
        topk: Number of blocks that each query attends to, including its own block.
        gate: Options of the gate.
        is_causal: Whether a query attends only to its own block and past blocks.
        is_full: Whether no sequence has more than ``topk`` blocks.
        per_tile: Whether a selection by ``gate="tile"`` may have one row for each tile. It has if
            the blocks of the layout consist of full tiles.

    Returns:
        The selection; None for full attention, which needs none.
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
        # Selects all blocks of a sequence as sink blocks, without scores.
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
    """Selects ``count`` candidates for each row of the gate."""
    sizes = GateSizes(layout.block_size, count, k.shape[2] - q.shape[2], is_causal)
    candidates = Candidates(layout.first_block, layout.end_block, layout.keys_of_block)
    return select_rows(q, k, sizes, gate, candidates)


def _select_full_blocks(
    q: Tensor, k: Tensor, layout: InPlaceLayout, count: int, gate: GateOptions
) -> Tensor:
    """Selects ``count`` past blocks, which are full, of each query's document."""
    full_blocks = layout.full_blocks
    keys = full_blocks.spread(k.detach())
    sizes = GateSizes(full_blocks.block_size, count, keys.shape[2] - q.shape[2], is_causal=True)
    candidates = Candidates(layout.first_block, layout.end_block)
    selected = select_rows(q, keys, sizes, gate, candidates)
    return expand_rows(selected, q.shape[1], q.shape[2], gate)


def _select_in_place(
    q: Tensor, k: Tensor, layout: InPlaceLayout, topk: int, gate: GateOptions
) -> Tensor:
    """Computes `moba_select` for documents in place, with indices among all blocks of the row."""
    shift = layout.short_blocks[:, None, :, None]
    own = layout.end_block[:, None, :, None] + shift
    past = _select_full_blocks(q, k, layout, topk - 1, gate)
    past = torch.where(past >= 0, past + shift, -1)
    return torch.cat([own.expand(*q.shape[:3], 1), past], dim=-1)


def select_rows(
    q: Tensor, k: Tensor, sizes: GateSizes, gate: GateOptions, candidates: Candidates = _PAST
) -> Tensor:
    """Selects candidates for each row of the gate, ``(B, Hq or Hkv, rows, width)`` int32."""
    rows = gate_rows(q, k.shape[1], gate)
    first, end = (
        x if x is None else x[:, :: gate.stride].contiguous()
        for x in (candidates.first, candidates.end)
    )
    block_size, count, offset, is_causal = sizes
    if block_size % gate.sub_blocks != 0:
        # A layout shortens blocks only if no sequence has more than one, which has no rivals.
        gate = gate._replace(sub_blocks=1)
    select: Any = _select_here if is_plain_call(rows, k) else _select
    selected: Tensor = select(
        *(rows, k.detach(), first, end, candidates.keys_of_block),
        *(offset, block_size, count, *gate, is_causal),
    )
    return selected


def gate_rows(q: Tensor, kv_heads: int, gate: GateOptions) -> Tensor:
    """Returns the rows: each query, the sum of each group, or the first query of each tile."""
    q = q.detach()
    if gate.per == "group":  # the sum of scores equals the score of the sum
        precise = torch.promote_types(q.dtype, torch.float32)
        q = rearrange(q, "b (h g) l d -> b h g l d", h=kv_heads).sum(2, dtype=precise)
    return q[:, :, :: gate.stride]


def expand_rows(
    selected: Tensor, heads: int, q_len: int, gate: GateOptions, *, first_query: int = 0
) -> Tensor:
    """Repeats a selection of rows for every query.

    Args:
        selected: ``(B, Hq or Hkv, rows, width)``, from `select_rows`.
        heads: Number of query heads.
        q_len: Number of queries.
        gate: Options of the gate.
        first_query: Index of the first query in its tile.

    Returns:
        ``(B, Hq, Lq, width)``.
    """
    if gate.per == "group":
        group = heads // selected.shape[1]
        selected = selected.repeat_interleave(group, 1, output_size=heads)
    if gate.per == "tile":
        tiles = selected.shape[2]
        selected = selected.repeat_interleave(TILE, 2, output_size=tiles * TILE)
        selected = selected[:, :, first_query : first_query + q_len]
    return selected


@without_autocast
def _select_here(
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
    sub_blocks: int,
    is_causal: bool,
) -> Tensor:
    sizes = GateSizes(block_size, count, offset, is_causal)
    gate = GateOptions(per, sink_blocks, local_blocks, sub_blocks)
    means = block_means(k, block_size, keys_of_block, sub_blocks)
    return select_by_means(rows, means, sizes, gate, Candidates(first_block, end_block))


# An operator, opaque to compilers, so that the selection is the same inside torch.compile and
# outside, and the result is a real buffer, which a mask_mod needs. The arguments are flat because
# the schema of an operator has no tuples.
_select = torch.library.custom_op("flexmoba::select", _select_here, mutates_args=())


@_select.register_fake
def _(rows: Tensor, *arguments: Any) -> Tensor:
    *_, offset, block_size, count, per, sink_blocks, local_blocks, _, is_causal = arguments
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
    """Selects candidates for each row of the gate, given the mean keys.

    Args:
        rows: ``(B, Hq or Hkv, rows, D)``, from `gate_rows`. Row ``i`` has the position
            ``sizes.offset + i * gate.stride``.
        means: Mean keys, ``(B, Hkv, blocks * gate.sub_blocks, D)``, from `block_means`.
        sizes: Sizes of the selection.
        gate: Options of the gate.
        candidates: The candidate blocks of rows, ``(B, rows)``.

    Returns:
        Block indices, ``(B, Hq or Hkv, rows, width)`` int32: local blocks, sink blocks, then the
        others by descending score; -1 for none.
    """
    n_blocks, scored = means.shape[2] // gate.sub_blocks, sizes.scored(gate)
    is_empty = scored == 0 or rows.numel() == 0 or n_blocks == 0
    has_kernel = not is_empty and _has_kernel(rows, scored)
    if has_kernel:
        from flexmoba.gate.kernel import select_on_cuda

        best = select_on_cuda(rows, means, sizes, gate, candidates)
        if gate.forced == 0:  # the kernel computes the candidates itself
            return best
    first, end = _candidate_ranges(rows, n_blocks, sizes, gate, candidates)
    if is_empty:
        best = rows.new_full((*rows.shape[:3], scored), -1, dtype=torch.int32)
    elif not has_kernel:
        begin, stop = first + gate.sink_blocks, end - gate.local_blocks
        best = top_blocks_in_pieces(rows, means, begin, stop, scored, gate.sub_blocks)
    forced = forced_blocks(first, end, gate)
    if forced is None:
        return best
    return torch.cat([forced.expand(best.shape[0], best.shape[1], -1, -1), best], dim=-1)


def _candidate_ranges(
    rows: Tensor, n_blocks: int, sizes: GateSizes, gate: GateOptions, candidates: Candidates
) -> tuple[Tensor, Tensor]:
    """Returns the first candidate of each row, and the block after the last one."""
    position = sizes.offset + torch.arange(rows.shape[2], device=rows.device)[None] * gate.stride
    if candidates.end is not None:
        end = candidates.end
    elif sizes.is_causal:
        end = position // sizes.block_size
    else:
        end = torch.full_like(position, n_blocks)
    first = position.new_zeros(1, 1) if candidates.first is None else candidates.first
    return first, end


def _has_kernel(rows: Tensor, count: int) -> bool:
    """Returns whether the Triton kernel supports these rows and this many scored blocks."""
    if not rows.is_cuda or rows.dtype == torch.float64 or not HAS_TRITON:
        return False
    from flexmoba.gate.kernel import MAX_COUNT, MAX_HEAD_DIM

    return count <= MAX_COUNT and rows.shape[-1] <= MAX_HEAD_DIM
