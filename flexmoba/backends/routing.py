"""Routing: sorts the pairs of queries and blocks by block, and fills tiles with them.

Each pair takes one row, and its partial output is computed there. The rows of a block are padded to
full tiles of `TILE` rows, so that each tile needs the keys of only one block. Rows have two
regions. The first holds the pairs of own blocks, at rows that follow from the shapes. The second
holds the pairs of past blocks, which are sorted. Routing computes only integers, no shape depends
on values, and nothing waits for the device.

Letters: B batch, G query heads of a KV head, N queries over all of (B, Hq, Lq), T blocks routed for
each query. In this module, a *block* belongs to one batch element and one KV head, and blocks are
counted over all of these: B * Hkv times the blocks of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.blocks import TILE, ceil_div
from flexmoba.selection import BlockSelection


class Tiles(NamedTuple):
    """The row of each pair and the block of each tile.

    Attributes:
        query_of_row: ``(rows,)`` int32, the query of each row, flat over batch, head and position;
            -1 for padding.
        last_key_of_row: ``(rows,)`` int32, the last key that the row sees, in a sequence of all
            blocks in which each block takes ``block_stride`` keys.
        row_of_pair: ``(N, 1 + T)`` int32, the row of each pair: column 0 is for the own block, the
            others are for the routed blocks; -1 for none.
        block_of_tile: ``(tiles,)`` int32, the block of each tile; the number of blocks for an
            unused tile.
        first_tile_of_block: ``(blocks,)`` int32, the first routed tile of each block.
        tiles_of_block: ``(blocks,)`` int32, the number of routed tiles of each block; they are
            consecutive.
        own_tiles_per_block: The number of tiles for the queries of a block in the first region.
        n_own_tiles: The number of tiles in the first region, over all blocks that contain a query.
    """

    query_of_row: Tensor
    last_key_of_row: Tensor
    row_of_pair: Tensor
    block_of_tile: Tensor
    first_tile_of_block: Tensor
    tiles_of_block: Tensor
    own_tiles_per_block: int
    n_own_tiles: int


def route(
    selection: BlockSelection,
    kv_heads: int,
    kv_len: int,
    block_stride: int,
    *,
    is_causal: bool,
    fuse: bool,
    tile: int = TILE,
) -> Tiles:
    """Sorts the pairs of a selection by block and fills tiles with them.

    Args:
        selection: The blocks of each query.
        kv_heads: Number of KV heads; the query heads of a KV head share its tiles.
        kv_len: Number of keys.
        block_stride: Number of keys from the start of a block to the start of the next, in a
            sequence of all blocks; at least the block size.
        is_causal: Whether queries attend to their own blocks, causally, in the first region.
        fuse: Whether torch.compile may trace the computation. That saves two thirds of the launches
            on a GPU and nothing on a CPU.
        tile: Rows in a tile.
    """
    routed, block_size, own, keys_of_block, _ = selection
    own_tiles_per_block, n_own_tiles = _own_tile_counts(
        routed.shape, kv_heads, kv_len, block_size, tile, is_causal=is_causal
    )
    tables = (_tables if fuse else _opaque_tables)(
        *(routed, own, keys_of_block, kv_heads, kv_len, block_size, block_stride),
        *(own_tiles_per_block, n_own_tiles, tile),
    )
    return Tiles(*tables, own_tiles_per_block, n_own_tiles)  # type: ignore[call-arg]


def first_visible_keys(
    first_key: Tensor,
    query_of_row: Tensor,
    block_of_tile: Tensor,
    q: Tensor,
    k: Tensor,
    block_size: int,
) -> Tensor:
    """Returns the index within its block of the first key that each row sees.

    Args:
        first_key: ``(B, Lq)`` int32, the first key that each query sees.
        query_of_row: ``(tiles, rows)`` int32, as in `Tiles`, by tile.
        block_of_tile: ``(tiles,)`` int32, as in `Tiles`.
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        block_size: Keys in a block.

    Returns:
        ``(tiles, rows)`` int32; negative if the first key is in an earlier block.
    """
    query = query_of_row.clamp(min=0)
    first = first_key[query // (q.shape[1] * q.shape[2]), query % q.shape[2]]
    block = block_of_tile % -(-k.shape[2] // block_size)
    return first - (block * block_size)[:, None]


def max_rows(
    shape: Sequence[int], kv_heads: int, kv_len: int, block_size: int, *, is_causal: bool
) -> int:
    """Returns the number of rows of `route` for a routed selection ``(B, Hq, Lq, T)``."""
    batch, heads, q_len, n_routed = shape
    _, own_tiles = _own_tile_counts(shape, kv_heads, kv_len, block_size, TILE, is_causal=is_causal)
    n_blocks = batch * kv_heads * ceil_div(kv_len, block_size)
    return (own_tiles + _max_past_tiles(batch * heads * q_len * n_routed, n_blocks, TILE)) * TILE


def _own_tile_counts(
    shape: Sequence[int], kv_heads: int, kv_len: int, block_size: int, tile: int, *, is_causal: bool
) -> tuple[int, int]:
    """Returns the number of tiles in the first region: per block, and for all blocks."""
    if not is_causal:
        return 0, 0
    batch, heads, q_len, _ = shape
    blocks = ceil_div(kv_len, block_size) - (kv_len - q_len) // block_size
    per_block = ceil_div(heads // kv_heads * block_size, tile)
    return per_block, batch * kv_heads * blocks * per_block


# The arguments are flat because the schema of an operator has no tuples.
def _tables(
    routed: Tensor,
    own: Tensor | None,
    keys_of_block: Tensor | None,
    kv_heads: int,
    kv_len: int,
    block_size: int,
    block_stride: int,
    own_tiles_per_block: int,
    n_own_tiles: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    past = _past_tables(routed, keys_of_block, kv_heads, kv_len, block_size, tile)
    query_of_row, last_key, row_of_pair, block_of_tile, first_tile, tiles_of_block = past
    own_row = row_of_pair.new_full((row_of_pair.shape[0],), -1)
    if n_own_tiles:
        own_query, own_last_key, own_row, own_block = _own_tables(
            routed, own, kv_heads, kv_len, block_size, own_tiles_per_block, tile
        )
        query_of_row = torch.cat([own_query, query_of_row])
        last_key = torch.cat([own_last_key, last_key])
        row_of_pair = torch.where(row_of_pair >= 0, row_of_pair + n_own_tiles * tile, -1)
        block_of_tile = torch.cat([own_block, block_of_tile])
        first_tile += n_own_tiles
    row_of_pair = torch.cat([own_row[:, None], row_of_pair], dim=1)
    last_key = (last_key.view(-1, tile) + (block_of_tile * block_stride)[:, None]).flatten()
    return query_of_row, last_key, row_of_pair, block_of_tile, first_tile, tiles_of_block


_opaque_tables = torch.library.custom_op("flexmoba::route", _tables, mutates_args=())


@_opaque_tables.register_fake
def _(
    routed: Tensor,
    own: Tensor | None,
    keys_of_block: Tensor | None,
    kv_heads: int,
    kv_len: int,
    block_size: int,
    block_stride: int,
    own_tiles_per_block: int,
    n_own_tiles: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, q_len, n_routed = routed.shape
    n_blocks = batch * kv_heads * ceil_div(kv_len, block_size)
    n_tiles = n_own_tiles + _max_past_tiles(batch * heads * q_len * n_routed, n_blocks, tile)

    def ints(*shape: int) -> Tensor:
        return routed.new_empty(shape, dtype=torch.int32)

    rows = n_tiles * tile
    pairs = ints(batch * heads * q_len, n_routed + 1)
    return ints(rows), ints(rows), pairs, ints(n_tiles), ints(n_blocks), ints(n_blocks)


def _max_past_tiles(pairs: int, n_blocks: int, tile: int) -> int:
    """Returns an upper bound of the tiles for any selection: each block pads less than one."""
    return pairs // tile + min(n_blocks, pairs)


def _past_tables(
    routed: Tensor,
    keys_of_block: Tensor | None,
    kv_heads: int,
    kv_len: int,
    block_size: int,
    tile_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the tables of the second region; the queries of each block are in ascending order."""
    device = routed.device
    batch, heads, q_len, n_routed = routed.shape
    blocks_per_head = ceil_div(kv_len, block_size)
    n_blocks = batch * kv_heads * blocks_per_head
    pairs = routed.numel()
    n_tiles = _max_past_tiles(pairs, n_blocks, tile_rows)
    if n_routed == 0:  # compilers do not support sorts of empty tensors
        none = torch.zeros(0, dtype=torch.int32, device=device)
        unused = torch.zeros(n_blocks, dtype=torch.int32, device=device)
        no_pairs = routed.reshape(batch * heads * q_len, 0).int()
        return none, none, no_pairs, none, unused, unused.clone()

    kv_head = torch.arange(batch * heads, device=device) // (heads // kv_heads)
    selected = routed.reshape(batch * heads, q_len * n_routed)
    block = selected + (kv_head * blocks_per_head).int()[:, None]
    block = torch.where(selected >= 0, block, n_blocks).flatten()
    # A radix sort of two-byte keys is twice as fast as one of four-byte keys.
    key = block.to(torch.int16) if n_blocks < 2**15 else block
    sorted_block, order = torch.sort(key, stable=True)
    edges = torch.arange(n_blocks + 1, device=device).to(key.dtype)
    first_pair = torch.searchsorted(sorted_block, edges, out_int32=True)
    count = first_pair.diff()
    tiles = (count + tile_rows - 1) // tile_rows
    last_tile = tiles.cumsum(0, dtype=torch.int32)
    first_tile = last_tile - tiles

    tile = torch.arange(n_tiles, device=device, dtype=torch.int32)
    block_of_tile = torch.searchsorted(last_tile, tile, right=True, out_int32=True)
    real_block = block_of_tile.clamp(max=n_blocks - 1)  # unused tiles get no rows below
    rank = ((tile - first_tile[real_block]) * tile_rows)[:, None] + torch.arange(
        tile_rows, device=device, dtype=torch.int32
    )
    is_used = (rank < count[real_block, None]) & (block_of_tile < n_blocks)[:, None]
    sorted_pair = torch.where(is_used, first_pair[real_block, None] + rank, 0)
    pair_of_row = torch.where(is_used, order[sorted_pair.flatten()].view_as(rank), pairs).flatten()
    query_of_row = torch.where(is_used.flatten(), pair_of_row // n_routed, -1).int()
    row = torch.arange(n_tiles * tile_rows, device=device, dtype=torch.int32)
    row_of_pair = torch.full((pairs + 1,), -1, device=device, dtype=torch.int32)
    row_of_pair.scatter_(0, pair_of_row, torch.where(is_used.flatten(), row, -1))

    if keys_of_block is None:
        last_key = (kv_len - real_block % blocks_per_head * block_size).clamp(max=block_size) - 1
    else:
        last_key = keys_of_block.flatten()[real_block] - 1
    last_key_of_row = last_key.int()[:, None].expand(-1, tile_rows).flatten()
    row_of_pair = row_of_pair[:pairs].view(batch * heads * q_len, n_routed)
    return query_of_row, last_key_of_row, row_of_pair, block_of_tile, first_tile, tiles


def _own_tables(
    routed: Tensor,
    own: Tensor | None,
    kv_heads: int,
    kv_len: int,
    block_size: int,
    tiles_per_block: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the tables of the first region: the queries of each block, one head after another."""
    device = routed.device
    batch, heads, q_len, _ = routed.shape
    group, offset = heads // kv_heads, kv_len - q_len
    first_block, blocks_per_head = offset // block_size, ceil_div(kv_len, block_size)
    own_blocks = blocks_per_head - first_block

    head = torch.arange(batch * kv_heads, device=device)[:, None, None]
    block = torch.arange(first_block, blocks_per_head, device=device)[:, None]
    row_in_block = torch.arange(tiles_per_block * tile, device=device)
    head_in_group, key = row_in_block // block_size, row_in_block % block_size
    query = block * block_size + key - offset
    exists = (head_in_group < group) & (query >= 0) & (query < q_len)
    query_of_row = torch.where(exists, (head * group + head_in_group) * q_len + query, -1).flatten()
    last_key_of_row = key.int().repeat(batch * kv_heads * own_blocks)
    block_of_tile = (head * blocks_per_head + block).int().expand(-1, -1, tiles_per_block).flatten()

    position = torch.arange(q_len, device=device) + offset
    flat_head = torch.arange(batch * heads, device=device)[:, None]
    own_block = flat_head // group * own_blocks + position // block_size - first_block
    row_in_own_block = flat_head % group * block_size + position % block_size
    row_of_query = (own_block * (tiles_per_block * tile) + row_in_own_block).flatten()
    if own is not None:
        attends_own = own.flatten()
        row_of_query = torch.where(attends_own, row_of_query, -1)
        query_of_row = torch.where(attends_own[query_of_row], query_of_row, -1)  # -1 stays -1
    return query_of_row.int(), last_key_of_row, row_of_query.int(), block_of_tile
