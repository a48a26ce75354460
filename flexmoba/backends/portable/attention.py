"""The portable backend: the tiles of the routed backend by plain tensor operations."""

from torch import Tensor

from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.portable.modified_scores import attend_by_blocks_modified
from flexmoba.backends.portable.operator import attend_by_blocks
from flexmoba.backends.routing import route
from flexmoba.backends.score_mod import ScoreModifier
from flexmoba.blocks import TILE
from flexmoba.selection import BlockSelection

_LEAST_TILE = 16  # rows: a vector of most CPUs


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
    """`block_attention` by plain tensor operations, from the key ``first_key (B, Lq)`` on."""
    kv_heads, kv_len = k.shape[1:3]
    block_size, scale = selection.block_size, options.scale
    # Short blocks fill short tiles: a block contains so many queries.
    queries = q.shape[1] // kv_heads * block_size
    tile = TILE
    while tile > _LEAST_TILE and queries <= tile // 2:  # of a length that compilers keep symbolic
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
