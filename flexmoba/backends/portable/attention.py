"""Routing, then the attention of the tiles by plain tensor operations."""

import torch
from torch import Tensor

from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.portable.modified_scores import attend_by_blocks_modified
from flexmoba.backends.portable.operator import attend_by_blocks, attend_by_blocks_backward
from flexmoba.backends.routing import Tiles, route
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
    tiles = _route(q, k, selection, is_causal=options.is_causal)
    block_size, scale = selection.block_size, options.scale
    if modifier is not None:
        return attend_by_blocks_modified(q, k, v, tiles, block_size, scale, modifier, first_key)
    return attend_by_blocks(q, k, v, tiles, block_size, scale, first_key)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes full attention; the arguments and results are those of `portable_attention`."""
    selection = _everything(q, k, is_causal=options.is_causal)
    return portable_attention(q, k, v, selection, options, modifier)


def full_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v of `full_attention`, without autograd."""
    q, k, _ = inputs
    tiles = _route(
        q, k, _everything(q, k, is_causal=options.is_causal), is_causal=options.is_causal
    )
    grads = grad_out, grad_lse, out, lse
    return attend_by_blocks_backward(*grads, inputs, tiles, k.shape[2], options.scale)


def _everything(q: Tensor, k: Tensor, *, is_causal: bool) -> BlockSelection:
    """Returns one block of all keys. If causal, it is the own block; if not, it is routed."""
    shape = *q.shape[:3], int(not is_causal)
    return BlockSelection(torch.zeros(shape, dtype=torch.int32, device=q.device), k.shape[2])


def _route(q: Tensor, k: Tensor, selection: BlockSelection, *, is_causal: bool) -> Tiles:
    kv_heads, kv_len = k.shape[1:3]
    block_size = selection.block_size
    # A block contains this many queries. Short tiles fit short blocks. The size is compared in a
    # loop because the block size may be a length that compilers keep symbolic.
    queries = q.shape[1] // kv_heads * block_size
    tile = TILE
    while tile > _MIN_TILE and queries <= tile // 2:
        tile //= 2
    return route(
        *(selection, kv_heads, kv_len, block_size), is_causal=is_causal, fuse=False, tile=tile
    )
