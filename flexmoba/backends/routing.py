"""Routing: from the blocks that each query wants to tiles of queries that want the same block.

A (query, block) pair is one part of one query's attention. All pairs of a block are laid out as
rows, padded to whole tiles of `TILE` rows, so that a tile needs one block of keys and no other.
Rows come in two regions: first the own blocks, whose layout follows from the shapes alone, then
the past blocks, sorted. Only integers are made here, shapes never depend on values, and nothing
waits for the device.

Letters: B batch, G query heads of a KV head, N queries over all of (B, Hq, Lq), T blocks routed
per query. A *block* below is one block of keys of one batch element and KV head: there are
B * Hkv * n_blocks of them, and their keys lie one after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.blocks import TILE, ceil_div
from flexmoba.selection import BlockSelection


class Tiles(NamedTuple):
    """Where every part of every query's attention is computed.

    Attributes:
        query_of_row: ``(rows,)`` int32, the query (flat over batch, head, position) whose part
            this row computes; -1 for padding.
        last_key_of_row: ``(rows,)`` int32, the last key that the row sees, in a sequence of all
            blocks where each takes ``block_stride`` keys.
        row_of_pair: ``(N, 1 + T)`` int32, the row of each part: column 0 is the own block, then
            the routed ones; -1 where there is none.
        block_of_tile: ``(tiles,)`` int32, the block that a tile attends to; the number of blocks
            for a tile that is not used.
        first_tile_of_block: ``(blocks,)`` int32, the first routed tile of each block.
        tiles_of_block: ``(blocks,)`` int32, how many routed tiles it has; they are neighbours.
        own_tiles_per_block: Tiles that the own part of a block takes.
        n_own_tiles: Tiles of the first region, over all blocks that hold a query.
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
    """Lays the (query, block) pairs out in tiles.

    Args:
        selection: The blocks of each query.
        kv_heads: Number of KV heads; query heads of one KV head share its tiles.
        kv_len: Number of keys.
        block_stride: Keys that a block takes where blocks are laid out one after the other; at
            least the block size.
        is_causal: Whether own blocks are attended to causally, apart from the routed ones.
        fuse: Whether a compiler may look inside. It saves two thirds of the launches on a GPU; on
            CPU there is nothing to gain from compiling this.
        tile: Rows in a tile.
    """
    routed, block_size, own, keys_of_block, _ = selection
    own_tiles_per_block, n_own_tiles = _own_region(
        routed.shape, kv_heads, kv_len, block_size, tile, is_causal=is_causal
    )
    tables = (_tables if fuse else _opaque_tables)(
        *(routed, own, keys_of_block, kv_heads, kv_len, block_size, block_stride),
        *(own_tiles_per_block, n_own_tiles, tile),
    )
    return Tiles(*tables, own_tiles_per_block, n_own_tiles)  # type: ignore[call-arg]


def first_places(
    first_key: Tensor,
    query_of_row: Tensor,
    block_of_tile: Tensor,
    q: Tensor,
    k: Tensor,
    block_size: int,
) -> Tensor:
    """Where in its block the first key of each row stands, ``(tiles, rows)``; below 0 if before."""
    query = query_of_row.clamp(min=0)  # flat over batch, head and position
    first = first_key[query // (q.shape[1] * q.shape[2]), query % q.shape[2]]
    block = block_of_tile % -(-k.shape[2] // block_size)
    return first - (block * block_size)[:, None]


def most_rows(
    shape: Sequence[int], kv_heads: int, kv_len: int, block_size: int, *, is_causal: bool
) -> int:
    """How many rows `route` makes for a selection of this shape."""
    batch, heads, q_len, width = shape
    _, own_tiles = _own_region(shape, kv_heads, kv_len, block_size, TILE, is_causal=is_causal)
    n_blocks = batch * kv_heads * ceil_div(kv_len, block_size)
    return (own_tiles + _past_tile_bound(batch * heads * q_len * width, n_blocks, TILE)) * TILE


def _own_region(
    shape: Sequence[int], kv_heads: int, kv_len: int, block_size: int, tile: int, *, is_causal: bool
) -> tuple[int, int]:
    """Tiles of the own region: of each block, and of all blocks that hold queries."""
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
    batch, heads, q_len, width = routed.shape
    n_blocks = batch * kv_heads * ceil_div(kv_len, block_size)
    n_tiles = n_own_tiles + _past_tile_bound(batch * heads * q_len * width, n_blocks, tile)

    def ints(*shape: int) -> Tensor:
        return routed.new_empty(shape, dtype=torch.int32)

    rows = n_tiles * tile
    pairs = ints(batch * heads * q_len, width + 1)
    return ints(rows), ints(rows), pairs, ints(n_tiles), ints(n_blocks), ints(n_blocks)


def _past_tile_bound(pairs: int, n_blocks: int, tile: int) -> int:
    """Tiles that suffice whatever is chosen: each block wastes less than one."""
    return pairs // tile + min(n_blocks, pairs)


def _past_tables(
    routed: Tensor,
    keys_of_block: Tensor | None,
    kv_heads: int,
    kv_len: int,
    block_size: int,
    tile_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The routed region: pairs sorted by block; the stable order keeps queries ascending."""
    device = routed.device
    batch, heads, q_len, width = routed.shape
    per_head = ceil_div(kv_len, block_size)
    n_blocks = batch * kv_heads * per_head
    pairs = routed.numel()
    n_tiles = _past_tile_bound(pairs, n_blocks, tile_rows)
    if width == 0:  # compilers do not take sorts of nothing
        none = torch.zeros(0, dtype=torch.int32, device=device)
        unused = torch.zeros(n_blocks, dtype=torch.int32, device=device)
        no_pairs = routed.reshape(batch * heads * q_len, 0).int()
        return none, none, no_pairs, none, unused, unused.clone()

    kv_head = torch.arange(batch * heads, device=device) // (heads // kv_heads)
    wanted = routed.reshape(batch * heads, q_len * width)
    block = wanted + (kv_head * per_head).int()[:, None]
    block = torch.where(wanted >= 0, block, n_blocks).flatten()
    # A radix sort of two bytes is twice as fast as one of four.
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
    known = block_of_tile.clamp(max=n_blocks - 1)  # an unused tile gets no row below
    rank = ((tile - first_tile[known]) * tile_rows)[:, None] + torch.arange(
        tile_rows, device=device, dtype=torch.int32
    )
    used = (rank < count[known, None]) & (block_of_tile < n_blocks)[:, None]
    sorted_pair = torch.where(used, first_pair[known, None] + rank, 0)
    pair_of_row = torch.where(used, order[sorted_pair.flatten()].view_as(rank), pairs).flatten()
    query_of_row = torch.where(used.flatten(), pair_of_row // width, -1).int()
    row = torch.arange(n_tiles * tile_rows, device=device, dtype=torch.int32)
    row_of_pair = torch.full((pairs + 1,), -1, device=device, dtype=torch.int32)
    row_of_pair.scatter_(0, pair_of_row, torch.where(used.flatten(), row, -1))

    if keys_of_block is None:
        last_key = (kv_len - known % per_head * block_size).clamp(max=block_size) - 1
    else:
        last_key = keys_of_block.flatten()[known] - 1
    last_key_of_row = last_key.int()[:, None].expand(-1, tile_rows).flatten()
    row_of_pair = row_of_pair[:pairs].view(batch * heads * q_len, width)
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
    """The own region: for every block that holds queries, its queries, head after head."""
    device = routed.device
    batch, heads, q_len, _ = routed.shape
    group, offset = heads // kv_heads, kv_len - q_len
    first_block, per_head = offset // block_size, ceil_div(kv_len, block_size)
    own_blocks = per_head - first_block

    head = torch.arange(batch * kv_heads, device=device)[:, None, None]
    block = torch.arange(first_block, per_head, device=device)[:, None]
    slot = torch.arange(tiles_per_block * tile, device=device)
    member, key = slot // block_size, slot % block_size  # which head of the group, which key
    query = block * block_size + key - offset
    there = (member < group) & (query >= 0) & (query < q_len)
    query_of_row = torch.where(there, (head * group + member) * q_len + query, -1).flatten()
    last_key_of_row = key.int().repeat(batch * kv_heads * own_blocks)
    block_of_tile = (head * per_head + block).int().expand(-1, -1, tiles_per_block).flatten()

    position = torch.arange(q_len, device=device) + offset
    flat_head = torch.arange(batch * heads, device=device)[:, None]
    own_block = flat_head // group * own_blocks + position // block_size - first_block
    slot_of_query = flat_head % group * block_size + position % block_size
    row_of_query = (own_block * (tiles_per_block * tile) + slot_of_query).flatten()
    if own is not None:
        wanted = own.flatten()
        row_of_query = torch.where(wanted, row_of_query, -1)
        query_of_row = torch.where(wanted[query_of_row], query_of_row, -1)  # -1 stays -1
    return query_of_row.int(), last_key_of_row, row_of_query.int(), block_of_tile
