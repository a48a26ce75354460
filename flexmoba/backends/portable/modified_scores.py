"""Attention of tiles with a ``score_mod``, by plain tensor operations.

The operators of `portable.operator` accept no functions. Here autograd computes the gradients, also
through the ``score_mod`` and its captured tensors. Tiles are processed in pieces, and the backward
pass recomputes the scores of each piece.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexmoba.backends.merge import merge_partial_outputs
from flexmoba.backends.routing import Tiles, first_visible_keys
from flexmoba.backends.score_mod import ScoreMod, ScoreModifier, checked_score_mod
from flexmoba.blocks import TILE
from flexmoba.rows import copy_rows
from flexmoba.runtime import without_autocast

_SCORES_AT_ONCE = 24 * TILE * 512  # scores of one piece, as in `portable.operator`


@without_autocast
def attend_by_blocks_modified(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    block_size: int,
    scale: float,
    modifier: ScoreModifier,
    first_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `attend_by_blocks` with a ``score_mod``."""
    score_mod, query_indices, key_position, _ = modifier
    dtype = torch.promote_types(q.dtype, torch.float32)
    n_tiles, query = tiles.block_of_tile.shape[0], tiles.query_of_row
    rows = copy_rows(q.reshape(-1, q.shape[-1]).to(dtype), query, tiles.row_of_pair)
    rows = rows.unflatten(0, (n_tiles, -1))
    n_rows = rows.shape[1]
    row_indices = query_indices.reshape(-1, 3)[query.clamp(min=0)].view(n_tiles, n_rows, 3)
    keys, values = (_blocks(x, block_size).to(dtype) for x in (k, v))
    block_key_position = _blocks(key_position[..., None], block_size)[..., 0]
    last_key_of_row = tiles.last_key_of_row.view(n_tiles, n_rows)
    first_visible = torch.zeros_like(last_key_of_row)
    if first_key is not None:
        first_visible = first_visible_keys(
            first_key, query.view(n_tiles, n_rows), tiles.block_of_tile, q, k, block_size
        )
    pieces = []
    step, starts = n_tiles, range(1)
    # A compiled loop would compile again for every number of tiles.
    if not torch.compiler.is_compiling():
        step = max(1, _SCORES_AT_ONCE // (n_rows * block_size))
        starts = range(0, n_tiles, step)
    for start in starts:
        piece = slice(start, start + step)
        block = tiles.block_of_tile[piece].clamp(max=keys.shape[0] - 1)
        last_visible = last_key_of_row[piece] - (block * block_size)[:, None]
        visible = first_visible[piece], last_visible
        inputs = rows[piece], _take(keys, block), _take(values, block)
        indices = row_indices[piece], block_key_position[block]
        if step == n_tiles:
            results = _attend_tiles(*inputs, visible, indices, scale, score_mod)
        else:
            results = checkpoint(
                _attend_tiles, *inputs, visible, indices, scale, score_mod, use_reentrant=False
            )
        pieces.append(results)
    out_rows, lse_rows = (torch.cat(x).flatten(0, 1) for x in zip(*pieces, strict=True))
    out, lse = merge_partial_outputs(out_rows, lse_rows, query, tiles.row_of_pair)
    return out.to(q.dtype).view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: tuple[Tensor, Tensor],
    indices: tuple[Tensor, Tensor],
    scale: float,
    score_mod: ScoreMod,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of each row of tiles to a range of keys of its block.

    Args:
        q: Queries, ``(tiles, rows, D)``, float32 or float64.
        k: Keys, ``(tiles, keys, D)``.
        v: Values, ``(tiles, keys, Dv)``.
        visible: The first and the last key of the block that each row sees, ``(tiles, rows)``
            int32.
        indices: The batch index, head and position of each row, ``(tiles, rows, 3)`` int32, and the
            position of each key, ``(tiles, keys)`` int32.
        scale: Factor on the scores.
        score_mod: A function of every score.

    Returns:
        The partial outputs ``(tiles, rows, Dv)`` and their log-sum-exps ``(tiles, rows)``.
    """
    (first_visible, last_visible), (row_indices, key_position) = visible, indices
    # The function takes one score, and is mapped over keys, over rows and over tiles.
    modify: Callable[..., Tensor] = torch.vmap(
        checked_score_mod(score_mod), in_dims=(0, None, None, None, 0)
    )
    modify = torch.vmap(modify, in_dims=(0, 0, 0, 0, None))
    modify = torch.vmap(modify)
    scores = modify((q * scale) @ k.mT, *row_indices.unbind(-1), key_position)
    key = torch.arange(k.shape[1], device=k.device)
    masked = (key > last_visible[..., None]) | (key < first_visible[..., None])
    scores = scores.masked_fill(masked, float("-inf"))
    # A row may see no key. Its softmax would be NaN, and its output is zeros instead.
    sees_none = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(sees_none, 0.0)
    weights = scores.softmax(-1).masked_fill(sees_none, 0.0)
    # See `tile_math.attend_tiles`.
    is_reached = weights.detach() @ (~v.isfinite()).to(v.dtype) > 0
    out = (weights @ v.nan_to_num(0.0, 0.0, 0.0)).masked_fill(is_reached, float("nan"))
    return out, scores.logsumexp(-1).masked_fill(sees_none[..., 0], float("-inf"))


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """Returns ``x (B, H, L, D)`` by block, ``(blocks, keys, D)``, with padded last blocks."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block_size))
    return x.reshape(-1, block_size, x.shape[3])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Returns ``x[index]``; its gradient adds in a fixed order, on CPU and on CUDA."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]
