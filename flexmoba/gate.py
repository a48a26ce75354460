"""The gate: every query scores the mean key of every block and picks the highest.

arXiv 2502.13189, Sec. 2.2, Eq. 5 and 6: the score is the inner product of the query and the mean
of the block's keys. The choice is exact and deterministic: means and scores accumulate in float32
(float64 for float64 inputs), and of equal scores the more recent block wins.
"""

import importlib.util
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.checks import (
    GateName,
    check_block_size,
    check_documents,
    check_gate,
    check_queries_and_keys,
    check_topk,
)
from flexmoba.precision import without_autocast
from flexmoba.sequence import InPlace, arrange, packing_of

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# The plain gate works through queries in pieces, so that its scores stay this small.
_SCORES_AT_ONCE = 2**22

# Blocks up to which rounds of `argmax`, one for each, are faster on CPU than `topk`.
_MOST_ROUNDS = 12

GATE_TILE = 128  # queries that share a choice under gate="tile"


class Gate(NamedTuple):
    """Whose scores choose, and what is chosen without a score; as `moba_select` describes it."""

    per: str = "token"
    sink_blocks: int = 0
    local_blocks: int = 0

    @property
    def stride(self) -> int:
        """Queries that one choice is for."""
        return GATE_TILE if self.per == "tile" else 1


class Candidates(NamedTuple):
    """Which blocks a query may choose from; by default those before its own, or all of them.

    Attributes:
        first: ``(B, Lq)`` int32, the first candidate of each query; None for block 0.
        end: ``(B, Lq)`` int32, the block after the last one; None for the block that the query
            stands in if causal, else for the number of blocks.
        keys_of_block: ``(B, blocks)`` int32, how many keys each block holds, where others than the
            last are not full: its mean is that of these.
    """

    first: Tensor | None = None
    end: Tensor | None = None
    keys_of_block: Tensor | None = None


_ALL = Candidates()


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
    options = Gate(gate, sink_blocks, local_blocks)
    if q.numel() == 0:
        return _select_blocks(q, k, block_size, topk, options, is_causal=is_causal)
    packing = packing_of(k.shape[2], cu_seqlens, document_ids)
    where = arrange(
        *(k.shape[2], block_size, packing, key_padding_mask),
        is_causal=is_causal,
        stride=options.stride,
    )
    if isinstance(where, InPlace):
        return _select_in_place(q, k, where, topk, options)
    if where is None:
        return _select_blocks(q, k, block_size, topk, options, is_causal=is_causal)
    q, k = where.spread(q.detach()), where.spread(k.detach())
    candidates = Candidates(where.first_block, where.end_block, where.keys_of_block)
    selection = _select_blocks(
        q, k, where.block_size, topk, options, candidates, is_causal=is_causal
    )
    return where.collect_selection(selection)


def _select_blocks(
    q: Tensor,
    k: Tensor,
    block_size: int,
    topk: int,
    gate: Gate,
    candidates: Candidates = _ALL,
    *,
    is_causal: bool,
) -> Tensor:
    """`moba_select` of checked arguments."""
    if not is_causal:
        return select_candidates(q, k, block_size, topk, gate, candidates, is_causal=False)
    own = own_block(q.shape[2], k.shape[2], block_size, q.device)
    past = select_candidates(q, k, block_size, topk - 1, gate, candidates, is_causal=True)
    return torch.cat([own.expand(q.shape[:3])[..., None], past], dim=-1)


def _select_in_place(q: Tensor, k: Tensor, where: InPlace, topk: int, gate: Gate) -> Tensor:
    """`moba_select` of documents that stay in place."""
    shift = where.other_blocks[:, None, :, None]
    own = where.end_block[:, None, :, None] + shift
    past = select_candidates(
        q,
        where.full_blocks.spread(k.detach()),
        where.full_blocks.block_size,
        topk - 1,
        gate,
        Candidates(where.first_block, where.end_block),
        is_causal=True,
    )
    past = torch.where(past >= 0, past + shift, -1)
    return torch.cat([own.expand(*q.shape[:3], 1), past], dim=-1)


def own_block(q_len: int, kv_len: int, block_size: int, device: torch.device) -> Tensor:
    """The block that each query stands in, ``(Lq,)`` int32."""
    return ((torch.arange(q_len, device=device) + (kv_len - q_len)) // block_size).int()


def select_candidates(
    q: Tensor,
    k: Tensor,
    block_size: int,
    count: int,
    gate: Gate,
    candidates: Candidates = _ALL,
    *,
    is_causal: bool,
) -> Tensor:
    """``count`` candidates of each query, ``(B, Hq, Lq, count)`` int32; see `moba_select`.

    There may be more columns than ``count`` where sinks and local blocks alone are more.
    """
    chosen = choose(q, k, block_size, count, gate, candidates, is_causal=is_causal)
    return shared_out(chosen, q.shape[1], q.shape[2], gate)


def choose(
    q: Tensor,
    k: Tensor,
    block_size: int,
    count: int,
    gate: Gate,
    candidates: Candidates = _ALL,
    *,
    is_causal: bool,
) -> Tensor:
    """`select_candidates` of what chooses alone: ``(B, Hq or Hkv, queries or tiles, count)``."""
    rows = gate_queries(q, k.shape[1], gate)
    first, end = (
        x if x is None else x[:, :: gate.stride].contiguous()
        for x in (candidates.first, candidates.end)
    )
    offset = k.shape[2] - q.shape[2]
    chosen: Tensor = _select(
        *(rows, k.detach(), first, end, candidates.keys_of_block),
        *(offset, block_size, count, *gate, is_causal),
    )
    return chosen


def gate_queries(q: Tensor, kv_heads: int, gate: Gate) -> Tensor:
    """The rows that choose: of every query, of a KV head's sum, or of every tile's first."""
    q = q.detach()
    if gate.per == "group":  # a sum of scores is the score of the sum
        precise = torch.promote_types(q.dtype, torch.float32)
        q = rearrange(q, "b (h g) l d -> b h g l d", h=kv_heads).sum(2, dtype=precise)
    return q[:, :, :: gate.stride]


def shared_out(
    chosen: Tensor, heads: int, q_len: int, gate: Gate, *, first_query: int = 0
) -> Tensor:
    """The choice of `gate_queries` for every query; the first one's place may be in a tile."""
    if gate.per == "group":
        chosen = chosen.repeat_interleave(heads // chosen.shape[1], 1, output_size=heads)
    if gate.per == "tile":
        tiles = chosen.shape[2]
        chosen = chosen.repeat_interleave(GATE_TILE, 2, output_size=tiles * GATE_TILE)
        chosen = chosen[:, :, first_query : first_query + q_len]
    return chosen


# Opaque to compilers: one implementation each for CUDA and the rest, the same inside
# torch.compile and outside, and its result is a real buffer, as a mask_mod needs.
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
    gate = Gate(per, sink_blocks, local_blocks)
    means = block_means(k, block_size, keys_of_block)
    return select_by_means(
        rows, means, offset, block_size, count, gate, is_causal, first_block, end_block
    )


@_select.register_fake
def _(
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
    width = max(count, sink_blocks + local_blocks)
    return rows.new_empty((*rows.shape[:3], width), dtype=torch.int32)


def select_by_means(
    rows: Tensor,
    means: Tensor,
    offset: int,
    block_size: int,
    count: int,
    gate: Gate,
    is_causal: bool,
    first_block: Tensor | None = None,
    end_block: Tensor | None = None,
) -> Tensor:
    """The choice of `gate_queries` given the mean keys, ``(B, Hkv, blocks, D)``.

    Row ``i`` stands at position ``offset + i * gate.stride``. ``first_block`` and ``end_block``
    are those of `Candidates`, of rows.
    """
    n_blocks, n_rows = means.shape[2], rows.shape[2]
    position = offset + torch.arange(n_rows, device=rows.device)[None] * gate.stride
    if end_block is not None:
        end = end_block
    else:
        end = position // block_size if is_causal else torch.full_like(position, n_blocks)
    first = position.new_zeros(1, 1) if first_block is None else first_block
    forced = always_selected(first, end, gate)
    scored = max(0, count - gate.sink_blocks - gate.local_blocks)
    if scored == 0 or rows.numel() == 0 or n_blocks == 0:
        best = rows.new_full((*rows.shape[:3], scored), -1, dtype=torch.int32)
    elif _has_kernel(rows, scored):
        from flexmoba.gate_kernel import select_on_cuda

        best = select_on_cuda(
            rows, means, first_block, end_block, offset, block_size, scored, gate, is_causal
        )
    else:
        first, end = first + gate.sink_blocks, end - gate.local_blocks
        best = _select_in_pieces(rows, means, first, end, scored)
    if forced is None:
        return best
    return torch.cat([forced.expand(best.shape[0], best.shape[1], -1, -1), best], dim=-1)


def _has_kernel(rows: Tensor, count: int) -> bool:
    if not rows.is_cuda or rows.dtype == torch.float64 or not _HAS_TRITON:
        return False
    from flexmoba.gate_kernel import MAX_COUNT, MAX_HEAD_DIM

    return count <= MAX_COUNT and rows.shape[-1] <= MAX_HEAD_DIM


def always_selected(first: Tensor, end: Tensor, gate: Gate) -> Tensor | None:
    """Local blocks and sinks among blocks ``first`` to ``end``, ``(B, 1, rows, them)`` int32.

    A block that is both counts as a sink.
    """
    if gate.local_blocks + gate.sink_blocks == 0:
        return None
    first, end = first[..., None], end[..., None]
    local = end - torch.arange(1, gate.local_blocks + 1, device=end.device)
    local = torch.where(local >= first + gate.sink_blocks, local, -1)
    sink = first + torch.arange(gate.sink_blocks, device=end.device)
    sink = torch.where(sink < end, sink, -1)
    return torch.cat([local, sink], dim=-1).int()[:, None]


def block_means(k: Tensor, block_size: int, keys_of_block: Tensor | None = None) -> Tensor:
    """The mean key of every block, ``(B, Hkv, blocks, D)`` in the dtype of ``k``.

    Blocks that are not full, by ``keys_of_block`` of `Candidates`, hold zeros beside their keys.
    """
    precise = torch.promote_types(k.dtype, torch.float32)
    batch, heads, length, dim = k.shape
    if keys_of_block is not None:  # of whole blocks
        sums = k.view(batch, heads, -1, block_size, dim).sum(3, dtype=precise)
        return (sums / keys_of_block.clamp(min=1)[:, None, :, None]).to(k.dtype)
    whole = length // block_size
    blocks = k[:, :, : whole * block_size].view(batch, heads, whole, block_size, dim)
    means = blocks.mean(3, dtype=precise)
    if whole * block_size < length:
        tail = k[:, :, whole * block_size :].mean(2, keepdim=True, dtype=precise)
        means = torch.cat([means, tail], dim=2)
    return means.to(k.dtype)


def _select_in_pieces(
    rows: Tensor, means: Tensor, first: Tensor, end: Tensor, count: int
) -> Tensor:
    """The best blocks from ``first`` to before ``end``, both ``(B or 1, rows or 1)``."""
    batch, heads, n_rows, _ = rows.shape
    kv_heads, n_blocks = means.shape[1:3]
    precise = torch.promote_types(rows.dtype, torch.float32)
    grouped = rearrange(rows, "b (h g) l d -> b h g l d", h=kv_heads)
    keys = means.to(precise)[:, :, None].mT
    first, end = (x.expand(x.shape[0], n_rows)[:, None, None] for x in (first, end))
    piece = max(1, _SCORES_AT_ONCE // (batch * heads * n_blocks))
    chosen = [
        highest(
            grouped[..., start : start + piece, :].to(precise) @ keys,
            first[..., start : start + piece],
            end[..., start : start + piece],
            count,
        )
        for start in range(0, n_rows, piece)
    ]
    selected: Tensor = rearrange(torch.cat(chosen, dim=-2), "b h g l t -> b (h g) l t")
    return selected


def highest(scores: Tensor, first: Tensor, end: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores of each row, the later of equals first.

    Candidates are the blocks from ``first`` to before ``end``, which expand to the rows.
    """
    n_blocks = scores.shape[-1]
    # A candidate that scores -inf still comes before a block that is none.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    block = torch.arange(n_blocks, device=scores.device)
    foreign = (block < first[..., None]) | (block >= end[..., None])
    scores = scores.masked_fill(foreign, float("-inf"))
    candidates = end - first
    # The first of equals comes first here: turned around, that is the later block.
    scores = scores.flip(-1)
    chosen = scores.new_full((*scores.shape[:-1], count), -1, dtype=torch.int32)
    if count > _MOST_ROUNDS:
        order = _descending(scores, min(count, n_blocks))
        best = (n_blocks - 1 - order).int()
        place = torch.arange(best.shape[-1], device=best.device)
        chosen[..., : best.shape[-1]] = torch.where(place < candidates[..., None], best, -1)
        return chosen
    for i in range(min(count, n_blocks)):
        best = scores.argmax(dim=-1, keepdim=True)
        scores.scatter_(-1, best, float("-inf"))
        chosen[..., i] = torch.where(i < candidates, (n_blocks - 1 - best[..., 0]).int(), -1)
    return chosen


def _descending(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of each row, the first of equals first, NaN before all."""
    if scores.dtype != torch.float32:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    # `topk` does not keep equals in order, and a stable sort takes ten times as long: of one number
    # each, the score above its index, none are equal.
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # now ordered like the scores
    bits = bits.masked_fill_(scores.isnan(), 0x7FFFFFFF)
    last = scores.shape[-1] - 1
    index = torch.arange(last, -1, -1, device=scores.device)
    best = ((bits.long() << 32) | index).topk(count, dim=-1).values
    return last - (best & 0xFFFFFFFF)
