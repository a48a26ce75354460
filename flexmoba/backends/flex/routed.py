"""The routed backend: one FlexAttention call over tiles of queries that attend to one block."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.backends.flex.block_masks import materialize, routed_mask
from flexmoba.backends.flex.compiled import call_flex, run_compiled
from flexmoba.backends.merge import merge_partial_outputs
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.routing import max_rows, route
from flexmoba.backends.score_mod import ScoreMod, ScoreModifier, remap_indices
from flexmoba.blocks import TILE
from flexmoba.rows import copy_rows
from flexmoba.selection import BlockSelection

# Before torch 2.14, FlexAttention's backward pass addresses rows with 32-bit offsets. Larger calls
# are split into pieces, which also limits their memory.
_MAX_ELEMENTS = 2**31 - 1


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `block_attention` by routing, one FlexAttention call for all tiles, and a merge."""
    query_indices = key_position = score_mod = None
    if modifier is not None:
        score_mod, query_indices, key_position, _ = modifier
    out, lse = _attend_in_pieces(
        (q, selection.routed, selection.own, query_indices),
        (k, v, key_position, selection.keys_of_block),
        score_mod=score_mod,
        block_size=selection.block_size,
        scale=options.scale,
        kernel_options=options.kernel_options,
        is_causal=options.is_causal,
    )
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


Tensors = tuple[Tensor | None, ...]


def _attend_in_pieces(of_queries: Tensors, of_keys: Tensors, **static: Any) -> list[Tensor]:
    (q, routed, *_), (k, v, *_) = of_queries, of_keys
    assert q is not None
    assert routed is not None
    assert k is not None
    assert v is not None
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rows = max_rows(
        routed.shape, kv_heads, kv_len, static["block_size"], is_causal=static["is_causal"]
    )
    if rows * max(q.shape[-1], v.shape[-1]) <= _MAX_ELEMENTS or q_len == heads == 1:
        return list(run_compiled(_attend_routed_tiles, *of_queries, *of_keys, **static))

    # The call is split into two halves, each of which may be split again: over the KV heads of all
    # batch elements, then over the query heads of one KV head, then over the queries of one head.
    halves: Any
    dim = 1
    if batch * kv_heads > 1:
        of_queries, of_keys = (
            tuple(x if x is None else x.flatten(0, 1)[None] for x in tensors)
            for tensors in (of_queries, of_keys)
        )
        kv_middle = (batch * kv_heads + 1) // 2
        middle = kv_middle * (heads // kv_heads)
        halves = zip(_split(of_queries, middle, 1), _split(of_keys, kv_middle, 1), strict=True)
    elif heads > 1:
        halves = ((half, of_keys) for half in _split(of_queries, (heads + 1) // 2, 1))
    else:
        dim, middle = 2, (q_len + 1) // 2
        end = kv_len - q_len + middle if static["is_causal"] else kv_len
        first_half_keys = tuple(x if x is None else x[:, :, :end] for x in of_keys)
        halves = zip(_split(of_queries, middle, 2), (first_half_keys, of_keys), strict=True)
    results = [_attend_in_pieces(*half, **static) for half in halves]
    return [torch.cat(outputs, dim) for outputs in zip(*results, strict=True)]


def _split(tensors: Tensors, size: int, dim: int) -> Iterable[Tensors]:
    return zip(*((None, None) if x is None else x.split(size, dim) for x in tensors), strict=True)


def _attend_routed_tiles(
    q: Tensor,
    routed: Tensor,
    own: Tensor | None,
    query_indices: Tensor | None,
    k: Tensor,
    v: Tensor,
    key_position: Tensor | None,
    keys_of_block: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    kv_heads, kv_len = k.shape[1:3]
    block_stride = -(-block_size // TILE) * TILE
    tiles = route(
        *(BlockSelection(routed, block_size, own, keys_of_block), kv_heads, kv_len, block_stride),
        is_causal=is_causal,
        # If the keys have a symbolic length, Inductor of torch 2.11 computes a wrong range for the
        # number of blocks that contain a chunk of queries.
        fuse=q.shape[2] == kv_len,
    )
    mask = routed_mask(
        tiles,
        q.shape,
        kv_heads,
        kv_len,
        block_size,
        block_stride,
        # A score_mod may capture tensors that require gradients.
        backward=torch.is_grad_enabled()
        and (score_mod is not None or any(x.requires_grad for x in (q, k, v))),
        keys_of_block=keys_of_block,
    )
    rows = copy_rows(q.reshape(-1, q.shape[-1]), tiles.query_of_row, tiles.row_of_pair)
    keys, values = (_concatenate_blocks(x, block_size, block_stride) for x in (k, v))
    if score_mod is not None and query_indices is not None and key_position is not None:
        row_indices = query_indices.reshape(-1, 3)[tiles.query_of_row.clamp(min=0)]
        block_keys = _concatenate_blocks(key_position[..., None], block_size, block_stride)
        indices = (*(x[None, None] for x in row_indices.unbind(-1)), block_keys[..., 0])
        score_mod = remap_indices(score_mod, *(materialize(x) for x in indices))
    rows = rows.view(1, 1, -1, q.shape[-1])
    out_rows, lse_rows = call_flex(
        rows, keys, values, mask, scale, kernel_options, score_mod, divisible=True
    )
    out, lse = merge_partial_outputs(
        out_rows.view(-1, v.shape[-1]), lse_rows.view(-1), tiles.query_of_row, tiles.row_of_pair
    )
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _concatenate_blocks(x: Tensor, block_size: int, block_stride: int) -> Tensor:
    """Returns ``x (B, H, L, D)`` as one sequence ``(1, 1, keys, D)`` of all blocks, padded."""
    if x.shape[2] % block_size != 0:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % block_size))
    if block_stride != block_size:
        x = F.pad(x.unflatten(2, (-1, block_size)), (0, 0, 0, block_stride - block_size))
    return x.reshape(1, 1, -1, x.shape[-1])
