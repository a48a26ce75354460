"""`moba_block_mask`: the selection of the gate as a BlockMask, for calls of FlexAttention."""

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends import full_mask, selection_mask
from flexmoba.blocks import ceil_div
from flexmoba.checks import check_block_size, check_queries_and_keys, check_topk
from flexmoba.gate import moba_select


def moba_block_mask(
    q: Tensor, k: Tensor, block_size: int, topk: int | None, *, is_causal: bool = True
) -> BlockMask:
    """The selection as a FlexAttention ``BlockMask``, exact for every query token.

    Gate and semantics are those of `moba_select` (arXiv 2502.13189, Sec. 2.2, Eq. 2 to 6). The
    mask composes with whatever ``flex_attention`` offers, such as a ``score_mod``. A query tile
    visits every block that any of its 128 queries selected, so it is fast only where neighbours
    agree; `flex_moba` costs the same on any data. Memory is O(B * Hq * (Lq / 128) * (Lk / 128)).

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, floating point.
        k: Keys, ``(B, Hkv, Lk, D)``, of the same dtype.
        block_size: Keys in a block, at least 1.
        topk: Blocks that each query attends to, its own included; None for full attention.
        is_causal: Whether a query sees only keys at or before its position ``i + Lk - Lq``.

    Returns:
        A ``BlockMask`` of ``seq_lengths`` ``(Lq, Lk)`` and block size 128, for
        ``flex_attention(q, k, v, block_mask=..., enable_gqa=Hq != Hkv)``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Shapes, dtypes or devices do not fit, a size is not positive, or there are no
            queries.

    Examples:
        >>> import torch
        >>> from flexmoba import moba_block_mask
        >>> q, k = torch.randn(2, 1, 2, 300, 16)
        >>> mask = moba_block_mask(q, k, block_size=100, topk=2)
        >>> mask.shape
        (1, 2, 300, 300)
    """
    check_queries_and_keys(q, k)
    check_block_size(block_size)
    check_topk(topk, none_allowed=True)
    if q.shape[0] == 0 or q.shape[2] == 0:
        raise ValueError(
            f"a BlockMask needs at least one query, got q of shape {tuple(q.shape)}; "
            "skip the call for empty inputs"
        )
    if topk is None or topk >= ceil_div(k.shape[2], block_size):
        return full_mask(q.shape[2], k.shape[2], q.device, is_causal=is_causal)
    selection = moba_select(q, k, block_size, topk, is_causal=is_causal)
    return selection_mask(selection, k.shape[2], block_size, is_causal=is_causal)
