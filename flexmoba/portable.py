"""Tiles attended with plain tensor operations: any device, any floating dtype, gradients.

A few tiles at a time, so that the scores of a piece stay in the cache and memory is that of the
rows. The backward pass recomputes each tile's weights from the final log-sum-exp, so nothing but
inputs, output, log-sum-exp and integers is saved. Half precision is computed in float32.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flexmoba.checks import no_second_derivatives
from flexmoba.merge import merge_parts
from flexmoba.precision import without_autocast
from flexmoba.routing import TILE, Tiles, first_places

# Scores of one piece: 24 tiles of 512 keys. Where they are written down, in the backward pass, they
# should stay in a core's share of the caches; smaller pieces cost more launches than that saves.
_SCORES_AT_ONCE = 24 * TILE * 512
_QUERIES_AT_ONCE = 2048  # to merge: their parts fit there, too

# Head dims and blocks are padded to whole vectors. A matrix product may round differently where
# its rows are aligned differently, and where a row stands depends on other queries' choices.
_VECTOR = 16


def attend_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    block_size: int,
    scale: float,
    first_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the blocks that its rows name.

    Args:
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, Lk, D)``.
        v: ``(B, Hkv, Lk, Dv)``.
        tiles: Where each part is computed.
        block_size: Keys in a block.
        scale: Factor on the scores.
        first_key: ``(B, Lq)`` int32, the first key that each query sees; None for key 0.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32 (float64 for float64 inputs).
    """
    out, lse = _attend(
        q,
        k,
        v,
        tiles.query_of_row,
        tiles.last_key_of_row,
        tiles.row_of_pair,
        tiles.block_of_tile,
        first_key,
        tiles.own_tiles_per_block,
        tiles.n_own_tiles,
        block_size,
        scale,
    )
    return out, lse


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
    queries = _whole_vectors(q.reshape(-1, q.shape[-1]))
    keys, values = _blocks(k, block_size), _blocks(v, block_size)
    tables = _whole_pieces(query_of_row, last_key_of_row, block_of_tile, n_own_tiles, keys)
    query_of_row, last_key_of_row, block_of_tile = tables
    last_place = last_key_of_row - (block_of_tile * block_size)[:, None]
    first_place = None
    if first_key is not None:
        first_place = first_places(first_key, query_of_row, block_of_tile, q, k, block_size)
    # May a routed block hide any of its room? Past blocks are full.
    ragged = n_own_tiles == 0 or block_size % _VECTOR != 0 or first_key is not None
    attend = _attend_tiles
    if q.device.type == "cpu":  # which alone has that kernel, and whose values can be read at once
        # Below it, no score overflows before the softmax.
        limit = math.sqrt(torch.finfo(precise).max / (q.shape[-1] * max(1.0, abs(scale))))
        is_small = all(_is_within(limit, x) for x in (queries, keys, values))
        attend = _attend_tiles_fused if is_small else partial(_attend_rows_apart, limit=limit)
    out_rows = queries.new_empty((*query_of_row.shape, values.shape[-1]), dtype=precise)
    lse_rows = queries.new_empty(query_of_row.shape, dtype=precise)
    for tiles, whole, seen in _pieces(
        query_of_row, block_of_tile, own_tiles_per_block, n_own_tiles, keys, block_size, ragged
    ):
        block = block_of_tile[tiles].clamp(max=keys.shape[0] - 1)
        tile_q = _take(queries, query_of_row[tiles].clamp(min=0), precise)
        key, value = _take(keys[:, :seen], block, precise), _take(values[:, :seen], block, precise)
        hidden = _hidden(last_place, first_place, tiles, n_own_tiles, slice(whole, seen))
        out_rows[tiles], lse_rows[tiles] = attend(tile_q, key, value, hidden, scale)
    out_rows, lse_rows = out_rows.flatten(0, 1), lse_rows.flatten()
    out, lse = v.new_empty(queries.shape[0], v.shape[-1]), lse_rows.new_empty(queries.shape[0])
    out_rows = out_rows[:, : v.shape[-1]]
    for start in range(0, queries.shape[0], _QUERIES_AT_ONCE):
        some = slice(start, start + _QUERIES_AT_ONCE)
        out[some], lse[some] = merge_parts(out_rows, lse_rows, row_of_pair[some])
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=precise)


@torch.library.custom_op("flexmoba::attend_portable_backward", mutates_args=())
@without_autocast
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
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
    queries = _whole_vectors(q.reshape(-1, q.shape[-1]))
    keys, values = _blocks(k, block_size), _blocks(v, block_size)
    tables = _whole_pieces(query_of_row, last_key_of_row, block_of_tile, n_own_tiles, keys)
    query_of_row, last_key_of_row, block_of_tile = tables
    last_place = last_key_of_row - (block_of_tile * block_size)[:, None]
    first_place = None
    if first_key is not None:
        first_place = first_places(first_key, query_of_row, block_of_tile, q, k, block_size)
    # May a routed block hide any of its room? Past blocks are full.
    ragged = n_own_tiles == 0 or block_size % _VECTOR != 0 or first_key is not None
    grads, lse = _whole_vectors(grad_out.reshape(-1, v.shape[-1])), lse.flatten()
    # d loss / d score = weight * (grad . value - delta); the log-sum-exp's gradient is a part.
    delta = (grad_out.to(precise) * out.to(precise)).sum(-1).flatten() - grad_lse.flatten()
    d_query_rows = queries.new_empty((*query_of_row.shape, queries.shape[-1]), dtype=precise)
    d_keys = torch.zeros_like(keys, dtype=precise)
    d_values = torch.zeros_like(values, dtype=precise)
    for tiles, whole, seen in _pieces(
        query_of_row, block_of_tile, own_tiles_per_block, n_own_tiles, keys, block_size, ragged
    ):
        block = block_of_tile[tiles].clamp(max=keys.shape[0] - 1)
        query = query_of_row[tiles].clamp(min=0)
        padding = (query_of_row[tiles] < 0)[..., None]  # padding has no weights
        hidden = _hidden(last_place, first_place, tiles, n_own_tiles, slice(whole, seen))
        tile_q, tile_grad = _take(queries, query, precise) * scale, _take(grads, query, precise)
        key, value = _take(keys[:, :seen], block, precise), _take(values[:, :seen], block, precise)
        weights = (tile_q @ key.mT).sub_(lse[query][..., None]).exp_()
        d_scores = (tile_grad @ value.mT).sub_(delta[query][..., None]).mul_(weights)
        for x in (weights, d_scores):
            x.masked_fill_(padding, 0.0)
            x[..., whole:].masked_fill_(hidden, 0.0)
        # Where NaN belongs it is in the weights by now; from here it would spread, as 0 * NaN.
        d_query_rows[tiles] = (d_scores @ _finite(key)).mul_(scale)
        _add_to_blocks(d_keys[:, :seen], block, d_scores.mT @ _finite(tile_q))
        _add_to_blocks(d_values[:, :seen], block, weights.mT @ _finite(tile_grad))
    d_query_rows = d_query_rows.flatten(0, 1)
    d_q = torch.zeros_like(queries, dtype=precise)
    for rows in row_of_pair.unbind(1):
        part = d_query_rows.index_select(0, rows.clamp(min=0))
        d_q += part.masked_fill_((rows < 0)[:, None], 0.0)
    d_q = d_q[:, : q.shape[-1]].to(q.dtype, copy=True).view(q.shape)
    return d_q, _unblocks(d_keys, k, block_size), _unblocks(d_values, v, block_size)


@_attend_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *(None for _ in range(9)))


_attend.register_autograd(_differentiate, setup_context=_save)
_attend_backward.register_autograd(no_second_derivatives)


def _pieces(
    query_of_row: Tensor,
    block_of_tile: Tensor,
    own_tiles_per_block: int,
    n_own_tiles: int,
    keys: Tensor,
    block_size: int,
    ragged: bool,
) -> Iterator[tuple[slice, int, int]]:
    """Cuts the tiles into pieces: which tiles, how many keys all rows see, and how many any."""
    n_blocks, room, _ = keys.shape
    rows = query_of_row.shape[1]
    for i in range(own_tiles_per_block):
        # The i-th tiles of all own blocks: their rows stand at the same places in their blocks.
        whole, seen = 0, room
        if block_size % rows == 0:
            first = i * rows % block_size
            whole, seen = 0 if ragged else first, first + rows
        step = own_tiles_per_block * _tiles_at_once(rows, seen)
        for start in range(i, n_own_tiles, step):
            yield slice(start, min(start + step, n_own_tiles), own_tiles_per_block), whole, seen
    used = block_of_tile.shape[0]
    if block_of_tile.device.type == "cpu":  # where reading a value waits for nothing
        used = n_own_tiles + int((block_of_tile[n_own_tiles:] < n_blocks).sum())
    whole, step = 0 if ragged else room, _tiles_at_once(rows, room)
    for start in range(n_own_tiles, used, step):
        yield slice(start, start + step), whole, room


def _tiles_at_once(rows: int, keys: int) -> int:
    return max(1, _SCORES_AT_ONCE // (rows * keys))


def _whole_pieces(
    query_of_row: Tensor,
    last_key_of_row: Tensor,
    block_of_tile: Tensor,
    n_own_tiles: int,
    keys: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables, by tile, with unused tiles added so that all routed pieces are of one size.

    Matrix products of another size may round differently, and how many tiles are used depends on
    the future: with equal pieces, future tokens never change the past, not by a bit.
    """
    n_blocks, room, _ = keys.shape
    n_tiles = block_of_tile.shape[0]
    rows = query_of_row.shape[0] // n_tiles if n_tiles else 1
    missing = (n_own_tiles - n_tiles) % _tiles_at_once(rows, room)
    return (
        F.pad(query_of_row.view(-1, rows), (0, 0, 0, missing), value=-1),
        F.pad(last_key_of_row.view(-1, rows), (0, 0, 0, missing), value=-1),
        F.pad(block_of_tile, (0, missing), value=n_blocks),
    )


def _attend_rows_apart(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, limit: float
) -> tuple[Tensor, Tensor]:
    """`_attend_tiles_fused`, but rows that reach something beyond the limit by `_attend_tiles`.

    The two round differently: what other rows hold, or see, must not choose for a row.
    """
    if all(_is_within(limit, x) for x in (q, k, v)):
        return _attend_tiles_fused(q, k, v, hidden, scale)
    small_q, small_k, small_v = (x.abs() <= limit for x in (q, k, v))
    large = ~(small_k.all(-1) & small_v.all(-1))[:, None].repeat(1, q.shape[1], 1)
    if hidden.shape[-1]:
        large[..., -hidden.shape[-1] :].masked_fill_(hidden, False)
    apart = large.any(-1) | ~small_q.all(-1)
    out, lse = _attend_tiles_fused(
        q.where(small_q, 0.0), k.where(small_k, 0.0), v.where(small_v, 0.0), hidden, scale
    )
    large_out, large_lse = _attend_tiles(q, k, v, hidden, scale)
    return torch.where(apart[..., None], large_out, out), torch.where(apart, large_lse, lse)


def _is_within(limit: float, x: Tensor) -> bool:
    lowest, highest = x.aminmax()
    return -limit <= float(lowest) and float(highest) <= limit  # neither of a NaN


def _attend_tiles_fused(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`_attend_tiles` by the kernel behind torch's attention on CPU, of what cannot overflow."""
    mask = None
    if hidden.shape[-1]:
        mask = q.new_zeros((hidden.shape[0], 1, q.shape[1], k.shape[1]))
        mask[:, 0, :, -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    value_dim, dim = v.shape[-1], max(q.shape[-1], v.shape[-1])  # the kernel wants them equal
    q, k, v = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
    )
    return out[:, 0, :, :value_dim], lse[:, 0]


def _attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of tiles ``(tiles, rows, D)``, the last keys of each partly hidden."""
    scores = (q * scale) @ k.mT
    if hidden.shape[-1]:
        scores[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    # A hidden key has weight 0, and 0 * NaN is NaN: values that are not finite are taken out of
    # the product, and rows where their weight is not 0 set to NaN.
    reached = weights @ (~v.isfinite()).to(v.dtype) > 0
    out = (weights @ _finite(v)).div_(total).masked_fill_(reached, float("nan"))
    return out, highest.add_(total.log_()).squeeze(-1)


def _hidden(
    last_place: Tensor, first_place: Tensor | None, tiles: slice, n_own_tiles: int, keys: slice
) -> Tensor:
    """Which of some keys of its block each row of some tiles must not see."""
    place = torch.arange(keys.start, keys.stop, device=last_place.device)
    if first_place is not None:
        before = place < first_place[tiles][..., None]
        return before | (place > last_place[tiles][..., None])
    # The own tiles of a piece hide alike, the routed ones each on their own.
    some = slice(0, 1) if tiles.start < n_own_tiles else slice(None)
    return place > last_place[tiles][some][..., None]


def _take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``x[index]`` in another dtype; several times faster than indexing on CPU."""
    taken = x.index_select(0, index.flatten())
    return taken.to(dtype).view(*index.shape, *x.shape[1:])


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """``(B, H, L, D)`` cut into ``(blocks, keys, D)``, in whole vectors and whole blocks."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % block_size))
    blocks = rearrange(padded, "b h (n s) d -> (b h n) s d", s=block_size)
    return _whole_vectors(_whole_vectors(blocks.mT).mT)


def _unblocks(blocks: Tensor, like: Tensor, block_size: int) -> Tensor:
    """The inverse of `_blocks`, in shape and dtype of ``like``."""
    batch, heads, length, dim = like.shape
    x = rearrange(blocks[:, :block_size, :dim], "(b h n) s d -> b h (n s) d", b=batch, h=heads)
    return x[:, :, :length].to(like.dtype, copy=True).contiguous()


def _whole_vectors(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _VECTOR
    return F.pad(x, (0, missing)).contiguous() if missing else x


def _add_to_blocks(blocks: Tensor, index: Tensor, x: Tensor) -> None:
    """Adds a tile's share to its block, several tiles a block, always in the same order."""
    if x.device.type == "cpu":
        blocks.index_add_(0, index, x)  # one after the other; index_put_ would be atomic
    else:
        blocks.index_put_((index,), x, accumulate=True)  # sorts; index_add_ would be atomic
