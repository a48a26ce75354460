"""BlockMasks, written down by index arithmetic: nothing of the size Lq * Lk is ever evaluated.

A `BlockMask` lists, for every 128 queries, the stretches of keys to visit, some of them *full*
(nothing to mask), the others *partial* (`mask_mod` decides, exactly), and for the backward pass
the transposed lists. Lists are int32, contiguous, ascending and free of duplicates.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends.routing import Tiles
from flexmoba.blocks import TILE, ceil_div

_MAX_STRETCHES = 16  # of a block; more would make the lists long for nothing

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def selection_mask(
    selection: Tensor,
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    keys_of_block: Tensor | None = None,
) -> BlockMask:
    """The mask of a selection ``(B, Hq, Lq, topk)``, all its stretches partial.

    ``keys_of_block (B, Hkv, blocks)`` is that of `routing.route`, the same for all heads.
    """
    batch, heads, q_len, topk = selection.shape
    device, offset = selection.device, kv_len - q_len
    n_blocks = ceil_div(kv_len, block_size)
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)

    padded = F.pad(selection, (0, 0, 0, q_tiles * TILE - q_len), value=-1)
    wanted = padded.view(batch, heads, q_tiles, TILE * topk).long()
    wanted = torch.where(wanted >= 0, wanted, n_blocks)
    blocks = torch.zeros(batch, heads, q_tiles, n_blocks + 1, dtype=torch.int32, device=device)
    blocks = blocks.scatter(-1, wanted, 1)[..., :n_blocks]
    # A stretch is visited if any block that it overlaps is wanted: a difference of running sums.
    before = F.pad(blocks.cumsum(-1), (1, 0))
    first_key = torch.arange(kv_tiles, device=device) * TILE
    last_key = (first_key + TILE - 1).clamp(max=kv_len - 1)
    visited = before[..., last_key // block_size + 1] > before[..., first_key // block_size]
    if is_causal:
        last_query = (torch.arange(q_tiles, device=device) * TILE + TILE).clamp(max=q_len) - 1
        visited = visited & (first_key <= (last_query + offset)[:, None])

    # What a mask_mod captures must be a real buffer: computed in the same graph, it would be
    # compiled into the kernel, or even replaced by its initial value.
    table, last_key = materialize(selection), last_key_of_query(q_len, kv_len, device)
    is_key = None
    if keys_of_block is not None:
        is_key = torch.arange(block_size, device=device) < keys_of_block[:, 0, :, None]
        is_key = materialize(is_key.flatten(1))

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = table[b, h, query, query * 0] * block_size
        seen: Tensor = (key >= first) & (key < first + block_size)
        for i in range(1, topk):
            first = table[b, h, query, query * 0 + i] * block_size
            seen = seen | ((key >= first) & (key < first + block_size))
        if is_causal:
            seen = seen & (key <= last_key[query])
        return seen if is_key is None else seen & is_key[b, key]

    return block_mask_of((q_len, kv_len), mask_mod, _lists(visited), None, _lists(visited.mT), None)


def full_mask(q_len: int, kv_len: int, device: torch.device, *, is_causal: bool) -> BlockMask:
    """Full attention, causal or not, bottom-right aligned."""
    offset = kv_len - q_len
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)
    first_key = torch.arange(kv_tiles, device=device) * TILE
    last_key = (first_key + TILE - 1).clamp(max=kv_len - 1)
    first_query = torch.arange(q_tiles, device=device)[:, None] * TILE
    last_query = (first_query + TILE - 1).clamp(max=q_len - 1)
    # Short tiles at the ends are never full, so that the kernel checks their bounds.
    whole = (first_key + TILE <= kv_len) & (first_query + TILE <= q_len)
    visited = torch.ones_like(whole)
    if is_causal:
        visited = first_key <= last_query + offset
        whole = whole & (last_key <= first_query + offset)
    visited, whole = visited[None, None], whole[None, None]

    last_seen = last_key_of_query(q_len, kv_len, device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = key <= last_seen[query] if is_causal else key >= 0
        return seen

    partial, full = visited & ~whole, whole
    return block_mask_of(
        (q_len, kv_len),
        mask_mod,
        _lists(partial),
        _lists(full),
        _lists(partial.mT),
        _lists(full.mT),
    )


def window_mask(first_key: Tensor, longest: int) -> BlockMask:
    """Each query's keys from a first one to its own position, as many queries as keys.

    The tiles of keys that a tile of queries visits are neighbours, and so are the tiles of queries
    that visit a tile of keys, so lists are as long as the longest window.

    Args:
        first_key: ``(B, L)`` ints, the first key that each query sees. It never falls along a row.
        longest: Keys that a query sees, at most.
    """
    length, device = first_key.shape[1], first_key.device
    n_tiles = ceil_div(length, TILE)
    width = min(n_tiles, ceil_div(longest - 1, TILE) + 1)
    tile = torch.arange(n_tiles, device=device)
    first_seen = first_key[:, None]  # for all heads
    first_visited = first_seen[..., tile * TILE] // TILE
    first_whole = ceil_div(first_seen[..., (tile * TILE + TILE - 1).clamp(max=length - 1)], TILE)
    # The tile on the diagonal is never whole, nor is any for a short tile of queries.
    first_whole = torch.minimum(first_whole, tile)
    first_whole = torch.where((tile + 1) * TILE <= length, first_whole, tile)
    place = torch.arange(width, device=device)

    # Of a tile of queries: tiles before the whole ones, the whole ones, the diagonal.
    n_before = (first_whole - first_visited)[..., None]
    before = torch.where(place < n_before, first_visited[..., None] + place, tile[:, None])
    whole = first_whole[..., None] + place
    # Of a tile of keys: the diagonal, tiles that see all of it, tiles that see the end of it.
    # Counted, as Inductor of torch 2.11 does not compile searchsorted of few values.
    end = (first_visited[..., None, :] <= tile[:, None]).sum(-1)
    end_whole = (first_whole[..., None, :] <= tile[:, None]).sum(-1)
    after = torch.where(place > 0, end_whole[..., None] + place - 1, tile[:, None])

    first_key = materialize(first_key.int())  # see `selection_mask`

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_key[b, query])

    def lists(count: Tensor, index: Tensor) -> Lists:
        return count, index.clamp(max=n_tiles - 1)

    return block_mask_of(
        (length, length),
        mask_mod,
        lists(n_before[..., 0] + 1, before),
        lists(tile - first_whole, whole),
        lists(end - end_whole + 1, after),
        lists(end_whole - tile - 1, tile[:, None] + 1 + place.expand_as(after)),
    )


def stretch_size(block_stride: int, most: int = _MAX_STRETCHES) -> int:
    """Keys in one entry of a mask's lists: divides the block, into so many at most."""
    grains = block_stride // TILE
    return TILE * next(
        size for size in range(1, grains + 1) if grains % size == 0 and grains // size <= most
    )


def routed_mask(
    tiles: Tiles,
    shape: Sequence[int],
    kv_heads: int,
    kv_len: int,
    block_size: int,
    block_stride: int,
    *,
    backward: bool,
    keys_of_block: Tensor | None = None,
) -> BlockMask:
    """The mask of the routed call: every tile of rows visits the keys of its one block.

    Args:
        tiles: What `routing.route` made, with the same ``block_stride``.
        shape: ``(B, Hq, Lq, D)`` of the queries.
        kv_heads: Number of KV heads.
        kv_len: Number of keys of a head.
        block_size: Keys in a block.
        block_stride: Keys that a block takes, padding included; a multiple of 128.
        backward: Whether to write the transposed lists.
        keys_of_block: As for `routing.route`.
    """
    batch, heads, q_len, _ = shape
    device = tiles.block_of_tile.device
    group, per_head = heads // kv_heads, ceil_div(kv_len, block_size)
    n_blocks, n_tiles = batch * kv_heads * per_head, tiles.block_of_tile.shape[0]
    size = stretch_size(block_stride)
    stretches = block_stride // size
    stretch = torch.arange(stretches, device=device)

    # Of each own tile (its place in the block) and each routed block: the stretches that all of
    # its rows see whole, and those that any row sees.
    place = torch.arange(max(tiles.own_tiles_per_block, 1), device=device)
    if block_size % TILE == 0:
        first_row = place * TILE % block_size
        own_whole, own_seen = (first_row + 1) // size, ceil_div(first_row + TILE, size)
    else:  # a tile may hold the end of one head and the start of the next
        own_whole, own_seen = place * 0, place * 0 + ceil_div(block_size, size)
    block = torch.arange(n_blocks, device=device)
    length = (kv_len - block % per_head * block_size).clamp(max=block_size)
    if keys_of_block is not None:
        length = keys_of_block.flatten()
    past_whole, past_seen = length // size, ceil_div(length, size)

    tile = torch.arange(n_tiles, device=device)
    is_own, used = tile < tiles.n_own_tiles, tiles.block_of_tile < n_blocks
    at = tiles.block_of_tile.clamp(max=n_blocks - 1).long()
    whole = torch.where(is_own, own_whole[tile % place.shape[0]], past_whole[at])
    seen = torch.where(is_own, own_seen[tile % place.shape[0]], past_seen[at])
    first = (at * stretches)[:, None]
    partial_lists = (
        torch.where(used, seen - whole, 0),
        first + (whole[:, None] + stretch).clamp(max=stretches - 1),
    )
    full_lists = torch.where(used, whole, 0), first + stretch

    partial_transposed = full_transposed = None
    if backward:
        # An own block's tiles stand at fixed places, a routed block's are neighbours.
        own_blocks = tiles.n_own_tiles // (batch * kv_heads * place.shape[0])
        own_index = block % per_head - (per_head - own_blocks)
        has_own = (own_index >= 0) & (own_blocks > 0)
        own_first = (block // per_head * own_blocks + own_index) * place.shape[0]
        width = min(place.shape[0] + ceil_div(group * q_len, TILE), n_tiles)

        def transposed(own_on: Tensor, past_on: Tensor) -> tuple[Tensor, Tensor]:
            own_count, own_list = _lists(own_on)  # (stretches,), (stretches, places)
            own_count = torch.where(has_own[:, None], own_count, 0)
            past_count = torch.where(past_on, tiles.tiles_of_block[:, None], 0)
            i = torch.arange(width, device=device)
            own_tile = own_first[:, None, None] + own_list[:, i.clamp(max=place.shape[0] - 1)]
            past_tile = tiles.first_tile_of_block[:, None, None] + i - own_count[..., None]
            index = torch.where(i < own_count[..., None], own_tile, past_tile)
            return (own_count + past_count).flatten(), index.clamp(0, n_tiles - 1).flatten(0, 1)

        is_whole = stretch[:, None] < own_whole
        partial_transposed = transposed(
            ~is_whole & (stretch[:, None] < own_seen),
            (stretch >= past_whole[:, None]) & (stretch < past_seen[:, None]),
        )
        full_transposed = transposed(is_whole, stretch < past_whole[:, None])

    last_key_of_row = materialize(tiles.last_key_of_row)  # see `selection_mask`

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = key <= last_key_of_row[row]
        return seen

    return block_mask_of(
        (n_tiles * TILE, n_blocks * block_stride),
        mask_mod,
        partial_lists,
        full_lists,
        partial_transposed,
        full_transposed,
        block_size=(TILE, size),
    )


def last_key_of_query(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """The last key of each query, as a buffer: a symbolic length in a mask_mod does not compile."""
    last_key = torch.arange(q_len, dtype=torch.int32, device=device) + (kv_len - q_len)
    buffer: Tensor = materialize(last_key)
    return buffer


Lists = tuple[Tensor, Tensor]  # how many entries each row has, and the entries


def _lists(visited: Tensor) -> Lists:
    """The True columns of each row, ascending: ``(..., rows, columns)`` to counts and indices."""
    return visited.sum(-1), visited.int().argsort(dim=-1, descending=True, stable=True)


def block_mask_of(
    seq_lengths: tuple[int, int],
    mask_mod: MaskMod,
    partial: Lists,
    full: Lists | None,
    partial_transposed: Lists | None,
    full_transposed: Lists | None,
    *,
    block_size: tuple[int, int] = (TILE, TILE),
) -> BlockMask:
    """A BlockMask of these lists, those of keys for every tile of queries first."""
    kv_num_blocks, kv_indices = _list_tensors(partial)
    assert kv_num_blocks is not None
    assert kv_indices is not None
    full_kv_num_blocks, full_kv_indices = _list_tensors(full)
    q_num_blocks, q_indices = _list_tensors(partial_transposed)
    full_q_num_blocks, full_q_indices = _list_tensors(full_transposed)
    return BlockMask(
        seq_lengths=seq_lengths,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
    )


def _list_tensors(lists: Lists | None) -> tuple[Tensor | None, Tensor | None]:
    if lists is None:
        return None, None
    count, index = (x.int().contiguous() for x in lists)
    if count.ndim == 1:  # one list for all batch elements and heads
        count, index = count[None, None], index[None, None]
    return count, index


@torch.library.custom_op("flexmoba::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """A buffer of its own, not to be computed inside the kernel that reads it."""
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
