"""Tiles attended under a ``score_mod``, with plain tensor operations: any device, any dtype.

What `portable` does by operators of its own, which no function can be passed to. Here autograd
differentiates, through the ``score_mod`` and what it captures, too; a few tiles at a time, whose
scores are computed again in the backward pass.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexmoba.backends.merge import combine
from flexmoba.backends.routing import Tiles, first_places
from flexmoba.backends.score_mod import ScoreMod, ScoreModifier, of_one_score
from flexmoba.blocks import TILE
from flexmoba.rows import copy_rows
from flexmoba.runtime import without_autocast

_SCORES_AT_ONCE = 24 * TILE * 512


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
    """`attend_by_blocks` of modified scores."""
    score_mod, place, key_position, _ = modifier
    dtype = torch.promote_types(q.dtype, torch.float32)
    n_tiles, query = tiles.block_of_tile.shape[0], tiles.query_of_row
    rows = copy_rows(q.reshape(-1, q.shape[-1]).to(dtype), query, tiles.row_of_pair)
    rows = rows.unflatten(0, (n_tiles, -1))
    n_rows = rows.shape[1]
    places = place.reshape(-1, 3)[query.clamp(min=0)].view(n_tiles, n_rows, 3)
    keys, values = (_blocks(x, block_size).to(dtype) for x in (k, v))
    key_places = _blocks(key_position[..., None], block_size)[..., 0]
    hidden_after = tiles.last_key_of_row.view(n_tiles, n_rows)
    first_place = torch.zeros_like(hidden_after)
    if first_key is not None:
        first_place = first_places(
            first_key, query.view(n_tiles, n_rows), tiles.block_of_tile, q, k, block_size
        )
    parts = []
    step, starts = n_tiles, range(1)
    if not torch.compiler.is_compiling():  # where a loop over tiles is compiled for their number
        step = max(1, _SCORES_AT_ONCE // (n_rows * block_size))
        starts = range(0, n_tiles, step)
    for start in starts:
        some = slice(start, start + step)
        block = tiles.block_of_tile[some].clamp(max=keys.shape[0] - 1)
        last_place = hidden_after[some] - (block * block_size)[:, None]
        seen = first_place[some], last_place
        inputs = rows[some], _take(keys, block), _take(values, block)
        where = seen, (places[some], key_places[block])
        if step == n_tiles:
            part = _attend_tiles(*inputs, *where, scale, score_mod)
        else:
            part = checkpoint(_attend_tiles, *inputs, *where, scale, score_mod, use_reentrant=False)
        parts.append(part)
    out_rows, lse_rows = (torch.cat(x).flatten(0, 1) for x in zip(*parts, strict=True))
    out, lse = combine(out_rows, lse_rows, query, tiles.row_of_pair)
    return out.to(q.dtype).view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    scale: float,
    score_mod: ScoreMod,
) -> tuple[Tensor, Tensor]:
    """Attention of tiles, each row to some neighbouring keys of its block.

    Args:
        q: ``(tiles, rows, D)``.
        k: ``(tiles, keys, D)``.
        v: ``(tiles, keys, Dv)``.
        seen: The first and the last key of the block that each row sees, ``(tiles, rows)``.
        places: Batch index, head and position of each row, ``(tiles, rows, 3)``, and the position
            of each key, ``(tiles, keys)``.
        scale: Factor on the scores.
        score_mod: The function of each score.
    """
    (first_place, last_place), (place, key_place) = seen, places
    modify: Callable[..., Tensor] = torch.vmap(
        of_one_score(score_mod), in_dims=(0, None, None, None, 0)
    )  # over keys,
    modify = torch.vmap(modify, in_dims=(0, 0, 0, 0, None))  # rows
    modify = torch.vmap(modify)  # and tiles
    scores = modify((q * scale) @ k.mT, *place.unbind(-1), key_place)
    key = torch.arange(k.shape[1], device=k.device)
    hidden = (key > last_place[..., None]) | (key < first_place[..., None])
    scores = scores.masked_fill(hidden, float("-inf"))
    # Nothing may be left to see: softmax over nothing is NaN, here it is zeros.
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    # A hidden key has weight 0, and 0 * NaN is NaN: see `portable`.
    reached = weights.detach() @ (~v.isfinite()).to(v.dtype) > 0
    out = (weights @ v.nan_to_num(0.0, 0.0, 0.0)).masked_fill(reached, float("nan"))
    return out, scores.logsumexp(-1).masked_fill(blind[..., 0], float("-inf"))


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """``(B, H, L, D)`` cut into ``(blocks, keys, D)``, the last of each head padded."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block_size))
    return x.reshape(-1, block_size, x.shape[3])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` whose gradient adds in a fixed order, on CPU and on CUDA."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]
