"""The portable backend as an operator with a backward pass.

It processes tiles in pieces, so that the scores of a piece stay in the CPU's cache and the memory
is proportional to the number of rows. The backward pass recomputes the weights of each tile from
the final log-sum-exp, so a call saves only inputs, output, log-sum-exp and integers. Half precision
is computed in float32.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flexmoba.backends.merge import merge_forward
from flexmoba.backends.operators import register_attention
from flexmoba.backends.portable.tile_math import (
    attend_large_rows_apart,
    attend_tiles,
    attend_tiles_by_torch,
    finite,
    is_within,
)
from flexmoba.backends.portable.workers import map_pieces
from flexmoba.backends.routing import Tiles, first_visible_keys
from flexmoba.blocks import TILE
from flexmoba.runtime import without_autocast

# Scores of one piece, 24 tiles of 512 keys. The backward pass writes the scores, which should stay
# in a core's share of the caches. Smaller pieces take more time for their launches than they save.
_SCORES_AT_ONCE = 24 * TILE * 512
_QUERIES_AT_ONCE = 2048  # queries to merge at once; their partial outputs fit in the caches, too

# Head dims and blocks are padded to full vectors. A matrix product may round a row differently at
# another alignment, and the index of a row depends on the selections of other queries.
_VECTOR = 16


def attend_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    block_size: int,
    scale: float,
    first_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of every query over the blocks of its rows.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        tiles: The row of each pair and the block of each tile.
        block_size: Keys in a block.
        scale: Factor on the scores.
        first_key: ``(B, Lq)`` int32, the first key that each query sees; None for key 0.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32 (float64 for float64 inputs).
    """
    out, lse = _attend(q, k, v, *_tables(tiles, first_key), block_size, scale)
    return out, lse


def attend_by_blocks_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    tiles: Tiles,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v of `attend_by_blocks`, without autograd."""
    tables = _tables(tiles, None)
    d_q, d_k, d_v = _attend_backward(
        *(grad_out, grad_lse, out, lse, *inputs, *tables), block_size, scale
    )
    return d_q, d_k, d_v


def _tables(tiles: Tiles, first_key: Tensor | None) -> tuple[Any, ...]:
    """Returns the arguments of the operators between the inputs and the block size."""
    return (
        *(tiles.query_of_row, tiles.last_key_of_row, tiles.row_of_pair, tiles.block_of_tile),
        *(first_key, tiles.own_tiles_per_block, tiles.n_own_tiles),
    )


# The arguments are flat because the schema of an operator has no tuples.
@torch.library.custom_op("flexmoba::attend_portable", mutates_args=())
@without_autocast
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_of_row: Tensor,
    last_key_of_row: Tensor,
    row_of_pair: Tensor,
    block_of_tile: Tensor,
    first_key: Tensor | None,
    own_tiles_per_block: int,
    n_own_tiles: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values, work = _prepare(
        *((q, k, v), (query_of_row, last_key_of_row, block_of_tile), first_key),
        *(own_tiles_per_block, n_own_tiles, block_size),
    )
    query_of_row, block_of_tile = work.query_of_row, work.block_of_tile
    attend = attend_tiles
    # Only CPU has the kernel of `attend_tiles_by_torch`, and its values are read without a wait.
    if q.device.type == "cpu":
        # If no element exceeds the limit, no score overflows before the softmax.
        limit = math.sqrt(torch.finfo(precise).max / (q.shape[-1] * max(1.0, abs(scale))))
        is_small = all(is_within(limit, x) for x in (queries, keys, values))
        attend = (
            attend_tiles_by_torch if is_small else partial(attend_large_rows_apart, limit=limit)
        )
    out_rows = queries.new_empty((*query_of_row.shape, values.shape[-1]), dtype=precise)
    lse_rows = queries.new_empty(query_of_row.shape, dtype=precise)

    def attend_piece(piece: _Piece) -> None:
        tiles, n_full, n_visible = piece
        block = block_of_tile[tiles].clamp(max=keys.shape[0] - 1)
        tile_q = _take(queries, query_of_row[tiles].clamp(min=0), precise)
        key, value = (
            _take(keys[:, :n_visible], block, precise),
            _take(values[:, :n_visible], block, precise),
        )
        masked = _masked(work, tiles, slice(n_full, n_visible))
        out_rows[tiles], lse_rows[tiles] = attend(tile_q, key, value, masked, scale)

    out, lse = v.new_empty(queries.shape[0], v.shape[-1]), lse_rows.new_empty(queries.shape[0])

    def merge_piece(start: int) -> None:
        piece = slice(start, start + _QUERIES_AT_ONCE)
        rows = out_rows.flatten(0, 1)[:, : v.shape[-1]], lse_rows.flatten()
        out[piece], lse[piece] = merge_forward(*rows, row_of_pair[piece])

    for _ in map_pieces(attend_piece, _pieces(work, keys), q.device):
        pass
    for _ in map_pieces(merge_piece, range(0, queries.shape[0], _QUERIES_AT_ONCE), q.device):
        pass
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


@torch.library.custom_op("flexmoba::attend_portable_backward", mutates_args=())
@without_autocast
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_of_row: Tensor,
    last_key_of_row: Tensor,
    row_of_pair: Tensor,
    block_of_tile: Tensor,
    first_key: Tensor | None,
    own_tiles_per_block: int,
    n_own_tiles: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values, work = _prepare(
        *((q, k, v), (query_of_row, last_key_of_row, block_of_tile), first_key),
        *(own_tiles_per_block, n_own_tiles, block_size),
    )
    query_of_row, block_of_tile = work.query_of_row, work.block_of_tile
    grads, lse = _pad_to_vectors(grad_out.reshape(-1, v.shape[-1])), lse.flatten()
    # d loss / d score = weight * (grad . value - delta). Delta includes the gradient of the
    # log-sum-exp.
    delta = (grad_out.to(precise) * out.to(precise)).sum(-1).flatten()
    if grad_lse is not None:
        delta -= grad_lse.flatten()
    d_query_rows = queries.new_empty((*query_of_row.shape, queries.shape[-1]), dtype=precise)
    d_keys = torch.zeros_like(keys, dtype=precise)
    d_values = torch.zeros_like(values, dtype=precise)

    def differentiate_piece(piece: _Piece) -> tuple[Tensor, int, Tensor, Tensor]:
        tiles, n_full, n_visible = piece
        block = block_of_tile[tiles].clamp(max=keys.shape[0] - 1)
        query = query_of_row[tiles].clamp(min=0)
        padding = (query_of_row[tiles] < 0)[..., None]
        masked = _masked(work, tiles, slice(n_full, n_visible))
        tile_q, tile_grad = _take(queries, query, precise) * scale, _take(grads, query, precise)
        key, value = (
            _take(keys[:, :n_visible], block, precise),
            _take(values[:, :n_visible], block, precise),
        )
        weights = (tile_q @ key.mT).sub_(lse[query][..., None]).exp_()
        d_scores = (tile_grad @ value.mT).sub_(delta[query][..., None]).mul_(weights)
        for x in (weights, d_scores):
            x.masked_fill_(padding, 0.0)
            x[..., n_full:].masked_fill_(masked, 0.0)
        # The weights and the gradients of the scores hold every NaN that belongs to the result.
        # From here on, 0 * NaN would spread NaN to other rows.
        d_query_rows[tiles] = (d_scores @ finite(key)).mul_(scale)
        return block, n_visible, d_scores.mT @ finite(tile_q), weights.mT @ finite(tile_grad)

    for block, n_visible, d_key, d_value in map_pieces(
        differentiate_piece, _pieces(work, keys), q.device
    ):  # one piece after the other, because the order of sums is fixed
        _add_to_blocks(d_keys[:, :n_visible], block, d_key)
        _add_to_blocks(d_values[:, :n_visible], block, d_value)
    d_query_rows = d_query_rows.flatten(0, 1)
    d_q = torch.zeros_like(queries, dtype=precise)
    for rows in row_of_pair.unbind(1):
        row_grads = d_query_rows.index_select(0, rows.clamp(min=0))
        d_q += row_grads.masked_fill_((rows < 0)[:, None], 0.0)
    d_q = d_q[:, : q.shape[-1]].to(q.dtype, copy=True).view(q.shape)
    return d_q, _unblocks(d_keys, k, block_size), _unblocks(d_values, v, block_size)


register_attention(_attend, _attend_backward, n_tensors=8)


class _Work(NamedTuple):
    """The tiles of a call and the keys that their rows see.

    Attributes:
        query_of_row: ``(tiles, rows)`` int32, the query of each row; -1 for padding.
        block_of_tile: ``(tiles,)`` int32, the block of each tile.
        last_visible: ``(tiles, rows)`` int32, the last key within its block that each row sees.
        first_visible: ``(tiles, rows)`` int32, the first key within its block that each row sees;
            negative if it is in an earlier block. None if all rows see the first key.
        own_tiles_per_block: As in `Tiles`.
        n_own_tiles: As in `Tiles`.
        block_size: Keys in a block.
        ragged: Whether some rows may see only part of a routed block.
    """

    query_of_row: Tensor
    block_of_tile: Tensor
    last_visible: Tensor
    first_visible: Tensor | None
    own_tiles_per_block: int
    n_own_tiles: int
    block_size: int
    ragged: bool


def _prepare(
    inputs: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    first_key: Tensor | None,
    own_tiles_per_block: int,
    n_own_tiles: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, _Work]:
    """Returns queries ``(N, D)``, keys and values ``(blocks, keys, D)``, and the tiles."""
    q, k, v = inputs
    queries = _pad_to_vectors(q.reshape(-1, q.shape[-1]))
    keys, values = _blocks(k, block_size), _blocks(v, block_size)
    query_of_row, last_key_of_row, block_of_tile = _pad_to_full_pieces(*tables, n_own_tiles, keys)
    last_visible = last_key_of_row - (block_of_tile * block_size)[:, None]
    first_visible = None
    if first_key is not None:
        first_visible = first_visible_keys(first_key, query_of_row, block_of_tile, q, k, block_size)
    # Past blocks are full. Padding of blocks to full vectors must be masked, too.
    ragged = n_own_tiles == 0 or block_size % _VECTOR != 0 or first_key is not None
    work = _Work(
        *(query_of_row, block_of_tile, last_visible, first_visible),
        *(own_tiles_per_block, n_own_tiles, block_size, ragged),
    )
    return queries, keys, values, work


_Piece = tuple[slice, int, int]


def _pieces(work: _Work, keys: Tensor) -> Iterator[_Piece]:
    """Yields pieces: the tiles, the number of keys that all rows see, and that any row sees."""
    n_blocks, n_keys, _ = keys.shape
    rows, n_own_tiles = work.query_of_row.shape[1], work.n_own_tiles
    for i in range(work.own_tiles_per_block):
        # The i-th tiles of all own blocks, whose rows have the same positions within their blocks.
        n_full, n_visible = 0, n_keys
        if work.block_size % rows == 0:
            first = i * rows % work.block_size
            n_full, n_visible = 0 if work.ragged else first, first + rows
        step = work.own_tiles_per_block * _tiles_at_once(rows, n_visible)
        for start in range(i, n_own_tiles, step):
            yield (
                slice(start, min(start + step, n_own_tiles), work.own_tiles_per_block),
                n_full,
                n_visible,
            )
    n_used = work.block_of_tile.shape[0]
    if work.block_of_tile.device.type == "cpu":  # reading a value does not wait for a device
        n_used = n_own_tiles + int((work.block_of_tile[n_own_tiles:] < n_blocks).sum())
    n_full, step = 0 if work.ragged else n_keys, _tiles_at_once(rows, n_keys)
    for start in range(n_own_tiles, n_used, step):
        yield slice(start, start + step), n_full, n_keys


def _tiles_at_once(rows: int, keys: int) -> int:
    return max(1, _SCORES_AT_ONCE // (rows * keys))


def _pad_to_full_pieces(
    query_of_row: Tensor,
    last_key_of_row: Tensor,
    block_of_tile: Tensor,
    n_own_tiles: int,
    keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tables by tile, with unused tiles added so that routed pieces have equal sizes.

    A matrix product of another size may round differently, and the number of used tiles depends on
    future tokens. With pieces of equal size, future tokens do not change past outputs by a bit.
    """
    n_blocks, n_keys, _ = keys.shape
    n_tiles = block_of_tile.shape[0]
    rows = query_of_row.shape[0] // n_tiles if n_tiles else 1
    missing = (n_own_tiles - n_tiles) % _tiles_at_once(rows, n_keys)
    return (
        F.pad(query_of_row.view(-1, rows), (0, 0, 0, missing), value=-1),
        F.pad(last_key_of_row.view(-1, rows), (0, 0, 0, missing), value=-1),
        F.pad(block_of_tile, (0, missing), value=n_blocks),
    )


def _masked(work: _Work, tiles: slice, keys: slice) -> Tensor:
    """Returns which of the given keys of its block each row of the given tiles does not see."""
    key = torch.arange(keys.start, keys.stop, device=work.last_visible.device)
    if work.first_visible is not None:
        before = key < work.first_visible[tiles][..., None]
        return before | (key > work.last_visible[tiles][..., None])
    # All own tiles of a piece have the same mask. Each routed tile has its own.
    distinct = slice(0, 1) if tiles.start < work.n_own_tiles else slice(None)
    return key > work.last_visible[tiles][distinct][..., None]


def _take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``x[index]`` in another dtype, on CPU several times faster than by indexing."""
    taken = x.index_select(0, index.flatten())
    return taken.to(dtype).view(*index.shape, *x.shape[1:])


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """Returns ``x (B, H, L, D)`` by block, ``(blocks, keys, D)``, padded to full vectors."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % block_size))
    blocks = rearrange(padded, "b h (n s) d -> (b h n) s d", s=block_size)
    return _pad_to_vectors(_pad_to_vectors(blocks.mT).mT)


def _unblocks(blocks: Tensor, like: Tensor, block_size: int) -> Tensor:
    """Computes the inverse of `_blocks`, in the shape and dtype of ``like``."""
    batch, heads, length, dim = like.shape
    x = rearrange(blocks[:, :block_size, :dim], "(b h n) s d -> b h (n s) d", b=batch, h=heads)
    return x[:, :, :length].to(like.dtype, copy=True).contiguous()


def _pad_to_vectors(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _VECTOR
    return F.pad(x, (0, missing)).contiguous() if missing else x


def _add_to_blocks(blocks: Tensor, index: Tensor, x: Tensor) -> None:
    """Adds the gradients of tiles to their blocks, always in the same order."""
    if x.device.type == "cpu":
        blocks.index_add_(0, index, x)  # sequential; index_put_ would be atomic
    else:
        blocks.index_put_((index,), x, accumulate=True)  # sorts; index_add_ would be atomic
