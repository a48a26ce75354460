"""The gate: every query scores the mean key of every block and picks the highest.

arXiv 2502.13189, Sec. 2.2, Eq. 5 and 6: the score is the inner product of the query and the mean
of the block's keys. The choice is exact and deterministic: means and scores accumulate in float32
(float64 for float64 inputs), and of equal scores the more recent block wins.
"""

import importlib.util

import torch
from einops import rearrange
from torch import Tensor

from flexmoba.checks import check_block_size, check_documents, check_queries_and_keys, check_topk
from flexmoba.precision import without_autocast
from flexmoba.sequence import layout_of

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# The plain gate works through queries in pieces, so that its scores stay this small.
_SCORES_AT_ONCE = 2**22


def moba_select(
    q: Tensor,
    k: Tensor,
    block_size: int,
    topk: int,
    *,
    is_causal: bool = True,
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
        cu_seqlens: Boundaries of packed documents, as in `flex_moba`. Indices then count the
            blocks of a row in order, over all its documents.
        document_ids: As in `flex_moba`; indices as with ``cu_seqlens``.
        key_padding_mask: As in `flex_moba`. Block 0 begins at the first real token.

    Returns:
        Block indices, int32 ``(B, Hq, Lq, topk)``: the own block first (if causal), the others by
        descending score, then -1 where there are no more candidates. Padding has -1 alone.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Shapes, dtypes or devices do not fit, or a size is not positive.
        NotImplementedError: Documents or padding, not causal or with fewer queries than keys.

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
    check_documents(q, k, cu_seqlens, document_ids, key_padding_mask, is_causal=is_causal)
    layout = None
    if q.numel() > 0:
        layout = layout_of(k.shape[2], block_size, cu_seqlens, document_ids, key_padding_mask)
    if layout is None:
        return select_blocks(q, k, block_size, topk, is_causal=is_causal)
    block_size, q, k = layout.block_size, layout.spread(q.detach()), layout.spread(k.detach())
    selection = select_blocks(
        q, k, block_size, topk, is_causal=True, first_block=layout.first_block
    )
    return layout.collect_selection(selection)


def select_blocks(
    q: Tensor,
    k: Tensor,
    block_size: int,
    topk: int,
    *,
    is_causal: bool,
    first_block: Tensor | None = None,
) -> Tensor:
    """`moba_select` of checked arguments; ``first_block`` as in `select_candidates`."""
    if not is_causal:
        return select_candidates(q, k, block_size, topk, is_causal=False)
    q_len, kv_len = q.shape[2], k.shape[2]
    own = own_block(q_len, kv_len, block_size, q.device).view(1, 1, q_len, 1)
    own = own.expand(*q.shape[:2], -1, -1)
    past = select_candidates(q, k, block_size, topk - 1, is_causal=True, first_block=first_block)
    return torch.cat([own, past], dim=-1)


def own_block(q_len: int, kv_len: int, block_size: int, device: torch.device) -> Tensor:
    """The block that each query stands in, ``(Lq,)`` int32."""
    return ((torch.arange(q_len, device=device) + (kv_len - q_len)) // block_size).int()


def select_candidates(
    q: Tensor,
    k: Tensor,
    block_size: int,
    count: int,
    *,
    is_causal: bool,
    first_block: Tensor | None = None,
) -> Tensor:
    """The ``count`` highest-scoring candidates of each query, ``(B, Hq, Lq, count)`` int32.

    If causal, the candidates are the blocks before the own one, from ``first_block (B, Lq)`` on.
    See `moba_select` for the rest.
    """
    selection: Tensor = _select(q.detach(), k.detach(), first_block, block_size, count, is_causal)
    return selection


# Opaque to compilers: one implementation each for CUDA and the rest, the same inside
# torch.compile and outside, and its result is a real buffer, as a mask_mod needs.
@torch.library.custom_op("flexmoba::select", mutates_args=())
@without_autocast
def _select(
    q: Tensor,
    k: Tensor,
    first_block: Tensor | None,
    block_size: int,
    count: int,
    is_causal: bool,
) -> Tensor:
    means = block_means(k, block_size)
    return select_by_means(q, means, k.shape[2], block_size, count, is_causal, first_block)


def select_by_means(
    q: Tensor,
    means: Tensor,
    kv_len: int,
    block_size: int,
    count: int,
    is_causal: bool,
    first_block: Tensor | None = None,
) -> Tensor:
    """`select_candidates` given the mean keys, ``(B, Hkv, blocks, D)``."""
    if count == 0 or q.numel() == 0 or means.shape[2] == 0:
        return q.new_full((*q.shape[:3], count), -1, dtype=torch.int32)
    if q.is_cuda and q.dtype != torch.float64 and _HAS_TRITON and first_block is None:
        from flexmoba.gate_kernel import MAX_COUNT, MAX_HEAD_DIM, select_on_cuda

        if count <= MAX_COUNT and q.shape[-1] <= MAX_HEAD_DIM:
            return select_on_cuda(q, means, kv_len, block_size, count, is_causal)
    return _select_in_pieces(q, means, kv_len, block_size, count, is_causal, first_block)


@_select.register_fake
def _(
    q: Tensor,
    k: Tensor,
    first_block: Tensor | None,
    block_size: int,
    count: int,
    is_causal: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:3], count), dtype=torch.int32)


def block_means(k: Tensor, block_size: int) -> Tensor:
    """The mean key of every block, ``(B, Hkv, blocks, D)`` in the dtype of ``k``."""
    precise = torch.promote_types(k.dtype, torch.float32)
    batch, heads, length, dim = k.shape
    whole = length // block_size
    blocks = k[:, :, : whole * block_size].view(batch, heads, whole, block_size, dim)
    means = blocks.mean(3, dtype=precise)
    if whole * block_size < length:
        tail = k[:, :, whole * block_size :].mean(2, keepdim=True, dtype=precise)
        means = torch.cat([means, tail], dim=2)
    return means.to(k.dtype)


def _select_in_pieces(
    q: Tensor,
    means: Tensor,
    kv_len: int,
    block_size: int,
    count: int,
    is_causal: bool,
    first_block: Tensor | None = None,
) -> Tensor:
    batch, heads, q_len, _ = q.shape
    kv_heads, n_blocks = means.shape[1:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q, "b (h g) l d -> b h g l d", h=kv_heads)
    keys = means.to(precise)[:, :, None].mT
    own = own_block(q_len, kv_len, block_size, q.device)
    piece = max(1, _SCORES_AT_ONCE // (batch * heads * n_blocks))
    chosen = [
        highest(
            grouped[..., start : start + piece, :].to(precise) @ keys,
            own[start : start + piece] if is_causal else None,
            None if first_block is None else first_block[:, None, None, start : start + piece],
            count,
        )
        for start in range(0, q_len, piece)
    ]
    selected: Tensor = rearrange(torch.cat(chosen, dim=-2), "b h g l t -> b (h g) l t")
    return selected


def highest(scores: Tensor, own: Tensor | None, first: Tensor | None, count: int) -> Tensor:
    """Indices of the ``count`` highest scores of each row, the later of equals first.

    Candidates stand before block ``own`` and from block ``first`` on, where given; both have the
    shape of the rows or expand to it.
    """
    n_blocks = scores.shape[-1]
    # A candidate that scores -inf still comes before a block that is none.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    candidates = torch.full_like(scores[..., 0], n_blocks, dtype=torch.int32)
    if own is not None:
        future = torch.arange(n_blocks, device=scores.device) >= own[..., None]
        scores = scores.masked_fill(future, float("-inf"))
        candidates = own.expand_as(candidates)
        if first is not None:
            foreign = torch.arange(n_blocks, device=scores.device) < first[..., None]
            scores = scores.masked_fill(foreign, float("-inf"))
            candidates = candidates - first
    # `max` returns the first of equals: turned around, that is the later block. For the few
    # blocks that are wanted, rounds of it are many times faster than `sort` or `topk`.
    scores = scores.flip(-1)
    chosen = scores.new_full((*scores.shape[:-1], count), -1, dtype=torch.int32)
    for i in range(min(count, n_blocks)):
        first = scores.argmax(dim=-1, keepdim=True)
        scores.scatter_(-1, first, float("-inf"))
        block = (n_blocks - 1 - first[..., 0]).int()
        chosen[..., i] = torch.where(i < candidates, block, -1)
    return chosen
