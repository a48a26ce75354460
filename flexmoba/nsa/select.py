"""`nsa_select`: the importance of each block, from softmax scores, and the most important blocks.

arXiv 2502.11089, Sec. 3.3.2, Eq. 8 to 11. The scores of a piece of the queries are in memory at a
time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flexmoba.checks import check_documents, check_options, check_positive, check_tensor
from flexmoba.gate import forced_blocks, top_blocks
from flexmoba.nsa.checks import check_compressed_keys, check_sizes
from flexmoba.nsa.layout import nsa_layout
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.runtime import HAS_TRITON, is_plain_call, without_autocast

# Number of scores of compressed keys in memory at a time.
_SCORES_AT_ONCE = 2**22


def nsa_select(
    q: Tensor,
    k_cmp: Tensor,
    kv_len: int,
    *,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Selects the blocks of keys that every query token and KV head attends to.

    This is the selection of arXiv 2502.11089, Sec. 3.3.2. The softmax scores of the compressed
    keys (Eq. 8), over the compressed blocks that end at or before the query, are the weights of
    these blocks. The importance of a block is the sum of the weights, each multiplied by the
    overlap of the compressed block and the block, in units of ``cmp_stride`` tokens (Eq. 9, with
    indices from 1), and summed over the query heads of a KV head (Eq. 10):

    ``importance[j] = sum_h sum_i weight[h, i] * overlap(i, j) / cmp_stride``

    The candidates are the blocks that begin at or before the query. The own block, which contains
    the query's position, sink blocks and local blocks are always selected and count towards
    ``topk``; the rest are the candidates of the highest importance (Eq. 11). If there are fewer
    candidates than ``topk``, all are selected. Of equal importances, the later block wins. NaN is
    the highest importance. Importances accumulate in float32 (float64 for float64 inputs). No
    gradient flows through the selection.

    Time is O(Lq * kv_len / cmp_stride). Beside the selection, the memory does not depend on the
    number of queries.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64. Query ``i`` has the
            position ``i + kv_len - Lq``.
        k_cmp: Compressed keys, ``(B, Hkv, blocks, D)``, in the dtype of q, where ``Hkv`` divides
            ``Hq``. Compressed block ``i`` holds the tokens from ``i * cmp_stride`` to
            ``i * cmp_stride + cmp_block - 1``. Only full blocks exist:
            ``blocks = (kv_len - cmp_block) // cmp_stride + 1``, or 0 below ``cmp_block`` tokens.
        kv_len: Number of tokens of the sequence, at least ``Lq``.
        cmp_block: Tokens in a compressed block.
        cmp_stride: Distance of the first tokens of two consecutive compressed blocks. It divides
            ``cmp_block`` and ``block_size``.
        block_size: Keys in a block. The last block may be shorter.
        topk: Number of blocks to select, at least ``1 + sink_blocks + local_blocks``.
        sink_blocks: Number of first blocks that are always selected.
        local_blocks: Number of blocks right before the own block that are always selected.
        scale: Factor on the scores, ``1 / sqrt(D)`` by default.
        cu_seqlens: Boundaries of packed documents, as in `flex_moba`, for ``Lq == kv_len``. Block
            indices then count the blocks of all documents of the row, in order. ``k_cmp`` lists the
            compressed blocks of all documents of the row, in order; compressed keys after them have
            no effect.
        document_ids: As in `flex_moba`. Indices are as with ``cu_seqlens``.
        key_padding_mask: As in `flex_moba`. Blocks and compressed blocks contain only the real
            tokens of a row.

    Returns:
        The selection: block indices, ``(B, Hkv, Lq, topk)``, int32, with -1 for none. A row lists
        the own block, local blocks from the nearest on, sink blocks, and then the others by
        descending importance. Rows of padding hold only -1.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, or a value is out of range.
        NotImplementedError: Documents or padding have fewer queries than keys.

    Examples:
        >>> import torch
        >>> from flexmoba.nsa import nsa_select
        >>> q = torch.randn(1, 4, 1000, 16)
        >>> k_cmp = torch.randn(1, 2, 61, 16)  # 61 = (1000 - 32) // 16 + 1
        >>> selection = nsa_select(q, k_cmp, 1000, topk=4)
        >>> selection.shape
        torch.Size([1, 2, 1000, 4])
        >>> selection[0, 0, 130].tolist()  # blocks 0 to 2 are the only candidates
        [2, 1, 0, -1]
    """
    sizes = NsaSizes(cmp_block, cmp_stride, block_size, topk, sink_blocks, local_blocks)
    check_sizes(sizes)
    check_options(scale, None, None, None)
    check_tensor("q", q)
    check_positive("kv_len", kv_len, "pass the number of tokens of the sequence")
    if q.shape[2] > kv_len:
        raise ValueError(
            f"kv_len must be at least the number of queries, got kv_len={kv_len} and "
            f"Lq={q.shape[2]}; count all tokens up to the last query"
        )
    check_compressed_keys(q, k_cmp, kv_len, sizes)
    tokens = q.new_empty(1).expand(q.shape[0], 1, kv_len, 1)
    check_documents(q, tokens, cu_seqlens, document_ids, key_padding_mask)
    if q.numel() == 0:
        return select_in_slots(q, k_cmp, kv_len, None, sizes, scale)
    layout = nsa_layout(kv_len, sizes, cu_seqlens, document_ids, key_padding_mask)
    q, k_cmp = layout.tokens.spread(q.detach()), layout.spread_compressed(k_cmp.detach())
    kv_len += q.shape[2] - tokens.shape[2] if layout.tokens.token_of_slot is not None else 0
    selection = select_in_slots(q, k_cmp, kv_len, layout.tokens.first_block, sizes, scale)
    return layout.tokens.collect_selection(selection)


def select_in_slots(
    q: Tensor,
    k_cmp: Tensor,
    kv_len: int,
    first_block: Tensor | None,
    sizes: NsaSizes,
    scale: float | None,
    lse: Tensor | None = None,
) -> Tensor:
    """Computes `nsa_select` for queries and compressed keys in slots.

    With packed documents, ``first_block (B, Lq)`` int32 is the first block of each query's
    document. Given ``lse (B, Hq, Lq)``, the log-sum-exp of the compressed branch, the kernels need
    not compute it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = q.detach(), k_cmp.detach(), first_block, None if lse is None else lse.detach()
    # An operator takes longer on the host than this function without it.
    select: Any = _select_here if is_plain_call(q, k_cmp) else _select
    selection: Tensor = select(*tensors, kv_len, *sizes, scale)
    return selection


@without_autocast
def _select_here(
    q: Tensor,
    k_cmp: Tensor,
    first_block: Tensor | None,
    lse: Tensor | None,
    kv_len: int,
    cmp_block: int,
    cmp_stride: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    sizes = NsaSizes(cmp_block, cmp_stride, block_size, topk, sink_blocks, local_blocks)
    if _has_kernels(q, k_cmp.shape[2], sizes):
        from flexmoba.nsa.kernel import select_on_cuda

        return select_on_cuda(q, k_cmp, first_block, lse, kv_len, sizes, scale)
    batch, heads, q_len, _ = q.shape
    kv_heads, n_compressed = k_cmp.shape[1:3]
    position = torch.arange(kv_len - q_len, kv_len, device=q.device)
    own = (position // block_size)[None]
    first_block = own * 0 if first_block is None else first_block
    columns = [own.int()[:, None, :, None], forced_blocks(first_block, own, sizes.gate)]
    shape = (batch, kv_heads, q_len, -1)
    always = torch.cat([x.expand(shape) for x in columns if x is not None], dim=-1)
    if sizes.scored == 0 or q.numel() == 0:
        return always
    first, end = first_block + sink_blocks, own - local_blocks
    piece = max(1, _SCORES_AT_ONCE // (batch * heads * max(n_compressed, 1)))
    pieces = []
    for start in range(0, q_len, piece):
        rows = slice(start, start + piece)
        importance = _importance(
            *(q[:, :, rows], k_cmp, position[rows], first_block[:, rows], kv_len, sizes, scale)
        )
        pieces.append(
            top_blocks(importance, first[:, None, rows], end[:, None, rows], sizes.scored)
        )
    return torch.cat([always, torch.cat(pieces, dim=2)], dim=-1)


# An operator, opaque to compilers, so that the selection is the same inside torch.compile and
# outside. The arguments are flat because the schema of an operator has no tuples.
_select = torch.library.custom_op("flexmoba::nsa_select", _select_here, mutates_args=())


@_select.register_fake
def _(
    q: Tensor,
    k_cmp: Tensor,
    first_block: Tensor | None,
    lse: Tensor | None,
    kv_len: int,
    cmp_block: int,
    cmp_stride: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    return q.new_empty((q.shape[0], k_cmp.shape[1], q.shape[2], topk), dtype=torch.int32)


def _has_kernels(q: Tensor, n_compressed: int, sizes: NsaSizes) -> bool:
    """Returns whether the Triton kernels support these queries and sizes, with a block to score."""
    if not q.is_cuda or q.dtype == torch.float64 or not HAS_TRITON:
        return False
    if q.numel() == 0 or n_compressed == 0 or sizes.scored == 0:
        return False
    from flexmoba.nsa.kernel import supports

    return supports(q, sizes)


def _importance(
    q: Tensor,
    k_cmp: Tensor,
    position: Tensor,
    first_block: Tensor,
    kv_len: int,
    sizes: NsaSizes,
    scale: float,
) -> Tensor:
    """Returns the importance of every block, ``(B, Hkv, rows, blocks)``, float32 or float64.

    Args:
        q: ``(B, Hq, rows, D)``.
        k_cmp: ``(B, Hkv, compressed blocks, D)``.
        position: ``(rows,)`` ints, the position of each query.
        first_block: ``(B or 1, rows)`` ints, the first block of each query's document.
        kv_len: Number of tokens.
        sizes: Sizes of the blocks.
        scale: Factor on the scores.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q, "b (h g) l d -> b h g l d", h=k_cmp.shape[1]).to(precise)
    scores = (grouped @ k_cmp.to(precise)[:, :, None].mT) * scale
    n_compressed, n_blocks = k_cmp.shape[2], sizes.blocks(kv_len)
    first_token = torch.arange(n_compressed, device=q.device) * sizes.cmp_stride
    unseen = first_token + sizes.cmp_block - 1 > position[:, None]
    unseen = unseen | (first_token < (first_block * sizes.block_size)[:, None, None, :, None])
    # The softmax of a query that sees no compressed block is NaN.
    weights = scores.masked_fill_(unseen, float("-inf")).softmax(-1).masked_fill_(unseen, 0.0)
    weight = weights.sum(2)
    return block_importance(weight, n_blocks, sizes)


def block_importance(weight: Tensor, n_blocks: int, sizes: NsaSizes) -> Tensor:
    """Returns the importance of blocks, ``(B, Hkv, rows, n_blocks)`` (Eq. 9).

    ``weight (B, Hkv, rows, compressed blocks)`` holds softmax weights, summed over query heads.
    """
    # In strides, compressed blocks and blocks have the lengths s and r. Block j overlaps the
    # compressed blocks from r * j - s + 1 to r * j + r - 1. Every block sums its overlaps in the
    # same order, so that equal weights give equal importances.
    r, s = sizes.block_size // sizes.cmp_stride, sizes.cmp_block // sizes.cmp_stride
    padded = F.pad(weight, (s - 1, r * n_blocks - weight.shape[-1]))
    importance = weight.new_zeros((*weight.shape[:3], n_blocks))
    for i in range(r + s - 1):
        overlap = min(i + 1, r, s, r + s - 1 - i)
        importance.add_(padded[..., i : i + r * (n_blocks - 1) + 1 : r], alpha=overlap)
    return importance
