"""Routing, then the attention of the tiles by plain tensor operations."""

from torch import Tensor

from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.portable.modified_scores import attend_by_blocks_modified
from flexmoba.backends.portable.operator import attend_by_blocks
from flexmoba.backends.routing import route
from flexmoba.backends.score_mod import ScoreModifier
from flexmoba.blocks import TILE
from flexmoba.selection import BlockSelection

_MIN_TILE = 16  # rows, a vector of most CPUs


def portable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
    *,
    first_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `block_attention` by plain tensor operations.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        selection: The blocks of each query.
        options: The options, of which ``scale`` and ``is_causal`` apply.
        modifier: A ``score_mod`` and the indices that it receives, or None.
        first_key: ``(B, Lq)`` int32, the first key that each query sees; None for key 0.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32 (float64 for float64 inputs).
    """
    kv_heads, kv_len = k.shape[1:3]
    block_size, scale = selection.block_size, options.scale
    # A block contains this many queries. Short tiles fit short blocks. The size is compared in a
    # loop because the block size may be a length that compilers keep symbolic.
    queries = q.shape[1] // kv_heads * block_size
    tile = TILE
    while tile > _MIN_TILE and queries <= tile // 2:
        tile //= 2
    tiles = route(
        *(selection, kv_heads, kv_len, block_size),
        is_causal=options.is_causal,
        fuse=False,
        tile=tile,
    )
    if modifier is not None:
        return attend_by_blocks_modified(q, k, v, tiles, block_size, scale, modifier, first_key)
    return attend_by_blocks(q, k, v, tiles, block_size, scale, first_key)
