"""BlockMasks from index arithmetic, without tensors of the size Lq * Lk.

A `BlockMask` lists, for every tile of 128 queries, the stretches of keys that the kernel visits. A
*stretch* is a range of consecutive keys, all of one length. A *full* stretch has no masked pairs;
in a *partial* stretch, `mask_mod` masks each pair exactly. For the backward pass, the mask also has
the transposed lists: the tiles of each stretch. Lists are int32, contiguous, ascending and without
duplicates.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends.routing import Tiles
from flexmoba.blocks import TILE, ceil_div

_MAX_STRETCHES = 16  # per block; shorter stretches would make the lists longer without a benefit

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def selection_mask(
    selection: Tensor,
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    keys_of_block: Tensor | None = None,
) -> BlockMask:
    """Returns the mask of a selection. All its stretches are partial and hold 128 keys.

    Args:
        selection: ``(B, Hq, Lq, topk)`` int32, block indices; -1 for none.
        kv_len: Number of keys.
        block_size: Keys in a block.
        is_causal: Whether a query sees only keys at or before its position.
        keys_of_block: ``(B, Hkv, blocks)`` int32, the number of keys in each block, equal for all
            heads; None if all blocks but the last one are full.
    """
    batch, heads, q_len, topk = selection.shape
    device, offset = selection.device, kv_len - q_len
    n_blocks = ceil_div(kv_len, block_size)
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)

    padded = F.pad(selection, (0, 0, 0, q_tiles * TILE - q_len), value=-1)
    selected = padded.view(batch, heads, q_tiles, TILE * topk).long()
    selected = torch.where(selected >= 0, selected, n_blocks)
    is_selected = torch.zeros(batch, heads, q_tiles, n_blocks + 1, dtype=torch.int32, device=device)
    is_selected = is_selected.scatter(-1, selected, 1)[..., :n_blocks]
    # A stretch is visited if it overlaps a selected block, a difference of cumulative sums.
    n_before = F.pad(is_selected.cumsum(-1), (1, 0))
    first_key = torch.arange(kv_tiles, device=device) * TILE
    last_key = (first_key + TILE - 1).clamp(max=kv_len - 1)
    visited = n_before[..., last_key // block_size + 1] > n_before[..., first_key // block_size]
    if is_causal:
        last_query = (torch.arange(q_tiles, device=device) * TILE + TILE).clamp(max=q_len) - 1
        visited = visited & (first_key <= (last_query + offset)[:, None])

    # A mask_mod must capture real buffers. The compiler would fuse a tensor of the same graph into
    # the kernel, or even replace it by its initial value.
    table, last_key = materialize(selection), last_key_of_query(q_len, kv_len, device)
    is_key = None
    if keys_of_block is not None:
        is_key = torch.arange(block_size, device=device) < keys_of_block[:, 0, :, None]
        is_key = materialize(is_key.flatten(1))

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = table[b, h, query, query * 0] * block_size
        visible: Tensor = (key >= first) & (key < first + block_size)
        for i in range(1, topk):
            first = table[b, h, query, query * 0 + i] * block_size
            visible = visible | ((key >= first) & (key < first + block_size))
        if is_causal:
            visible = visible & (key <= last_key[query])
        return visible if is_key is None else visible & is_key[b, key]

    return block_mask_of(
        (q_len, kv_len), mask_mod, lists_of(visited), None, lists_of(visited.mT), None
    )


def full_mask(q_len: int, kv_len: int, device: torch.device, *, is_causal: bool) -> BlockMask:
    """Returns the mask of full attention; if causal, the last query is aligned to the last key."""
    offset = kv_len - q_len
    q_tiles, kv_tiles = ceil_div(q_len, TILE), ceil_div(kv_len, TILE)
    first_key = torch.arange(kv_tiles, device=device) * TILE
    last_key = (first_key + TILE - 1).clamp(max=kv_len - 1)
    first_query = torch.arange(q_tiles, device=device)[:, None] * TILE
    last_query = (first_query + TILE - 1).clamp(max=q_len - 1)
    # Short tiles and stretches at the ends are partial, so that the kernel checks their bounds.
    is_full = (first_key + TILE <= kv_len) & (first_query + TILE <= q_len)
    visited = torch.ones_like(is_full)
    if is_causal:
        visited = first_key <= last_query + offset
        is_full = is_full & (last_key <= first_query + offset)
    visited, is_full = visited[None, None], is_full[None, None]

    last_visible = last_key_of_query(q_len, kv_len, device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible: Tensor = key <= last_visible[query] if is_causal else key >= 0
        return visible

    partial, full = visited & ~is_full, is_full
    return block_mask_of(
        (q_len, kv_len),
        mask_mod,
        lists_of(partial),
        lists_of(full),
        lists_of(partial.mT),
        lists_of(full.mT),
    )


def window_mask(first_key: Tensor, longest: int) -> BlockMask:
    """Returns the mask of causal windows: from a first key of each query to its own position.

    There are as many queries as keys, and stretches hold 128 keys. A tile of queries visits
    consecutive stretches, and consecutive tiles visit a stretch. Lists are therefore only as long
    as the longest window.

    Args:
        first_key: ``(B, L)`` int32 or int64, the first key that each query sees; it never
            decreases along a row.
        longest: An upper bound of the number of keys that a query sees.
    """
    length, device = first_key.shape[1], first_key.device
    n_tiles = ceil_div(length, TILE)
    width = min(n_tiles, ceil_div(longest - 1, TILE) + 1)
    tile = torch.arange(n_tiles, device=device)
    first_visible = first_key[:, None]  # for all heads
    first_visited = first_visible[..., tile * TILE] // TILE
    first_full = ceil_div(first_visible[..., (tile * TILE + TILE - 1).clamp(max=length - 1)], TILE)
    # The stretch on the diagonal is never full. A short tile of queries has no full stretch.
    first_full = torch.minimum(first_full, tile)
    first_full = torch.where((tile + 1) * TILE <= length, first_full, tile)
    entry = torch.arange(width, device=device)

    # The stretches of a tile: the ones before the full ones, the full ones, and the diagonal.
    n_before = (first_full - first_visited)[..., None]
    before = torch.where(entry < n_before, first_visited[..., None] + entry, tile[:, None])
    full = first_full[..., None] + entry
    # The tiles of a stretch: the diagonal, the tiles that see all of it, and the tiles that see
    # its end. They are counted, because Inductor of torch 2.11 does not compile searchsorted of few
    # values.
    end = (first_visited[..., None, :] <= tile[:, None]).sum(-1)
    end_full = (first_full[..., None, :] <= tile[:, None]).sum(-1)
    after = torch.where(entry > 0, end_full[..., None] + entry - 1, tile[:, None])

    first_key = materialize(first_key.int())  # see `selection_mask`

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_key[b, query])

    def lists(count: Tensor, index: Tensor) -> Lists:
        return count, index.clamp(max=n_tiles - 1)

    return block_mask_of(
        (length, length),
        mask_mod,
        lists(n_before[..., 0] + 1, before),
        lists(tile - first_full, full),
        lists(end - end_full + 1, after),
        lists(end_full - tile - 1, tile[:, None] + 1 + entry.expand_as(after)),
    )


def stretch_size(block_stride: int, max_stretches: int = _MAX_STRETCHES) -> int:
    """Returns the number of keys in a stretch so that a block has at most ``max_stretches``."""
    units = block_stride // TILE
    return TILE * next(
        size for size in range(1, units + 1) if units % size == 0 and units // size <= max_stretches
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
    """Returns the mask of the routed call, in which every tile visits the keys of its block.

    Args:
        tiles: The result of `routing.route` with the same ``block_stride``.
        shape: ``(B, Hq, Lq, D)`` of the queries.
        kv_heads: Number of KV heads.
        kv_len: Number of keys of a head.
        block_size: Keys in a block.
        block_stride: Keys of a block with its padding, a multiple of 128.
        backward: Whether the mask has the transposed lists.
        keys_of_block: ``(B, Hkv, blocks)`` int32, the number of keys in each block; None if all
            blocks but the last one are full.
    """
    batch, heads, q_len, _ = shape
    device = tiles.block_of_tile.device
    group, per_head = heads // kv_heads, ceil_div(kv_len, block_size)
    n_blocks, n_tiles = batch * kv_heads * per_head, tiles.block_of_tile.shape[0]
    size = stretch_size(block_stride)
    stretches = block_stride // size
    stretch = torch.arange(stretches, device=device)

    # For each own tile of a block and for each routed block: the number of stretches that all of
    # its rows see completely, and the number of stretches that any row sees.
    tile_in_block = torch.arange(max(tiles.own_tiles_per_block, 1), device=device)
    if block_size % TILE == 0:
        first_row = tile_in_block * TILE % block_size
        own_full, own_visible = (first_row + 1) // size, ceil_div(first_row + TILE, size)
    else:  # a tile may hold rows of two heads
        own_full, own_visible = tile_in_block * 0, tile_in_block * 0 + ceil_div(block_size, size)
    block = torch.arange(n_blocks, device=device)
    length = (kv_len - block % per_head * block_size).clamp(max=block_size)
    if keys_of_block is not None:
        length = keys_of_block.flatten()
    past_full, past_visible = length // size, ceil_div(length, size)

    tile = torch.arange(n_tiles, device=device)
    is_own, is_used = tile < tiles.n_own_tiles, tiles.block_of_tile < n_blocks
    real_block = tiles.block_of_tile.clamp(max=n_blocks - 1).long()
    n_full = torch.where(is_own, own_full[tile % tile_in_block.shape[0]], past_full[real_block])
    n_visible = torch.where(
        is_own, own_visible[tile % tile_in_block.shape[0]], past_visible[real_block]
    )
    first = (real_block * stretches)[:, None]
    partial_lists = (
        torch.where(is_used, n_visible - n_full, 0),
        first + (n_full[:, None] + stretch).clamp(max=stretches - 1),
    )
    full_lists = torch.where(is_used, n_full, 0), first + stretch

    partial_transposed = full_transposed = None
    if backward:
        # The own tiles of a block have fixed indices, and its routed tiles are consecutive.
        own_blocks = tiles.n_own_tiles // (batch * kv_heads * tile_in_block.shape[0])
        own_index = block % per_head - (per_head - own_blocks)
        has_own = (own_index >= 0) & (own_blocks > 0)
        own_first = (block // per_head * own_blocks + own_index) * tile_in_block.shape[0]
        width = min(tile_in_block.shape[0] + ceil_div(group * q_len, TILE), n_tiles)

        def transposed(own_visits: Tensor, past_visits: Tensor) -> tuple[Tensor, Tensor]:
            own_count, own_list = lists_of(own_visits)  # (stretches,), (stretches, own tiles)
            own_count = torch.where(has_own[:, None], own_count, 0)
            past_count = torch.where(past_visits, tiles.tiles_of_block[:, None], 0)
            i = torch.arange(width, device=device)
            own_tile = (
                own_first[:, None, None] + own_list[:, i.clamp(max=tile_in_block.shape[0] - 1)]
            )
            past_tile = tiles.first_tile_of_block[:, None, None] + i - own_count[..., None]
            index = torch.where(i < own_count[..., None], own_tile, past_tile)
            return (own_count + past_count).flatten(), index.clamp(0, n_tiles - 1).flatten(0, 1)

        own_is_full = stretch[:, None] < own_full
        partial_transposed = transposed(
            ~own_is_full & (stretch[:, None] < own_visible),
            (stretch >= past_full[:, None]) & (stretch < past_visible[:, None]),
        )
        full_transposed = transposed(own_is_full, stretch < past_full[:, None])

    last_key_of_row = materialize(tiles.last_key_of_row)  # see `selection_mask`

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        visible: Tensor = key <= last_key_of_row[row]
        return visible

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
    """Returns the last key of each query as a buffer ``(Lq,)`` int32.

    A mask_mod needs the buffer because one with a symbolic length does not compile.
    """
    last_key = torch.arange(q_len, dtype=torch.int32, device=device) + (kv_len - q_len)
    buffer: Tensor = materialize(last_key)
    return buffer


Lists = tuple[Tensor, Tensor]  # the number of entries of each row, and the entries


def lists_of(visited: Tensor) -> Lists:
    """Returns the number of True columns and their indices for bools ``(..., rows, columns)``."""
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
    """Returns a BlockMask with these lists.

    Args:
        seq_lengths: Number of queries and number of keys.
        mask_mod: The function that masks pairs in partial stretches.
        partial: The partial stretches of each tile.
        full: The full stretches of each tile, or None.
        partial_transposed: The tiles that visit each stretch as a partial one, or None.
        full_transposed: The tiles that visit each stretch as a full one, or None.
        block_size: Queries in a tile and keys in a stretch.
    """
    tensors = [
        x
        for lists in (partial, full, partial_transposed, full_transposed)
        for x in (_list_tensors(lists) if lists is not None else (None, None))
    ]
    if partial[0].ndim > 1 and partial[0].shape[:2] != (1, 1):
        # The CUDA kernels find the list of a batch element and head by the stride of heads alone,
        # so lists must be contiguous. Inductor may lay out a tensor of the same graph otherwise,
        # such as ``(B, 1, tiles)`` with heads outermost, but not the result of an operator.
        real = iter(materialize_all([x for x in tensors if x is not None]))
        tensors = [x if x is None else next(real) for x in tensors]
    kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices = tensors[:4]
    q_num_blocks, q_indices, full_q_num_blocks, full_q_indices = tensors[4:]
    assert kv_num_blocks is not None
    assert kv_indices is not None
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


def _list_tensors(lists: Lists) -> Lists:
    count, index = (x.int().contiguous() for x in lists)
    if count.ndim == 1:  # one list for all batch elements and heads
        count, index = count[None, None], index[None, None]
    return count, index


@torch.library.custom_op("flexmoba::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """Returns a copy that no compiler fuses into the kernel that reads it."""
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flexmoba::materialize_all", mutates_args=())
def materialize_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies that are contiguous, also where the compiler would lay them out otherwise."""
    return [x.clone(memory_format=torch.contiguous_format) for x in tensors]


@materialize_all.register_fake
def _(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
