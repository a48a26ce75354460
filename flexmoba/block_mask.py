"""`moba_block_mask`: the selection of the gate as a BlockMask for FlexAttention."""

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends import full_mask, selection_mask
from flexmoba.blocks import ceil_div
from flexmoba.checks import check_block_size, check_queries_and_keys, check_topk
from flexmoba.gate import moba_select


def moba_block_mask(
    q: Tensor, k: Tensor, block_size: int, topk: int | None, *, is_causal: bool = True
) -> BlockMask:
    """Returns the selection of the gate as a FlexAttention ``BlockMask``, exact for every query.

    The blocks are selected by `moba_select` (arXiv 2502.13189, Sec. 2.2, Eq. 2 to 6). The mask
    works with all other arguments of ``flex_attention``, such as ``score_mod``. FlexAttention
    computes every block that any of the 128 queries of a tile selects. The mask is therefore fast
    only if neighbouring queries select the same blocks; the cost of `flex_moba` does not depend on
    the data. The memory of the mask is O(B * Hq * (Lq / 128) * (Lk / 128)).

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64.
        k: Keys, ``(B, Hkv, Lk, D)``, in the dtype of q.
        block_size: Keys in a block, at least 1.
        topk: Number of blocks that each query attends to, including the own block, which contains
            the query's position. None selects all blocks (full attention).
        is_causal: Whether a query attends only to keys at or before its position
            ``i + Lk - Lq``.

    Returns:
        A ``BlockMask`` with ``seq_lengths`` ``(Lq, Lk)`` and block size 128, for
        ``flex_attention(q, k, v, block_mask=..., enable_gqa=Hq != Hkv)``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes, dtypes or devices do not match, a size is not positive, or there are no
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
