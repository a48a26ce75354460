"""The mask of ``gate="tile"``: 128 queries that chose as one are a row of a `BlockMask` as it is.

Nothing is sorted, gathered or merged, and past blocks are full, with no mask to evaluate. Lists
are exact, so a compiled call needs nothing of the `mask_mod` but the causal diagonal; uncompiled
FlexAttention, which ignores lists, must not be given this mask.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends.flex.block_masks import Lists, block_mask_of, last_key_of_query, stretch_size
from flexmoba.blocks import TILE

# Of a block. Every tile visits all of the stretch that it stands in, which more of them make
# shorter; the lists of the backward pass grow with them.
_MAX_STRETCHES = 4


def tile_gate_mask(
    chosen: Tensor, q_len: int, kv_len: int, block_size: int, *, backward: bool
) -> BlockMask:
    """The causal mask of tiles of queries, each with its own block and those that it chose.

    Args:
        chosen: ``(B, Hq, Lq / 128, T)`` int32, distinct blocks before each tile's own; -1 for none.
        q_len: Number of queries, the last of ``kv_len`` rounded up to whole tiles; a multiple of
            128 itself.
        kv_len: Number of keys.
        block_size: Keys in a block, a multiple of 128.
        backward: Whether to write the transposed lists.
    """
    tiles, count = chosen.shape[2:]
    offset = -(-kv_len // TILE) * TILE - q_len
    size = stretch_of(block_size)
    per_block = block_size // size
    start = offset + torch.arange(tiles, device=chosen.device) * TILE  # position of a tile
    own_first = start // block_size * per_block  # in stretches
    diagonal = start // size

    # Whole past blocks in their order, then the stretches of the own block before the diagonal.
    none = torch.iinfo(torch.int32).max
    past = torch.where(chosen >= 0, chosen, none).sort(-1).values
    n_past = (chosen >= 0).sum(-1, keepdim=True) * per_block
    n_own = (diagonal - own_first)[:, None]
    place = torch.arange((count + 1) * per_block, device=chosen.device)
    full = own_first[:, None] + (place - n_past).clamp(min=0)
    if count > 0:
        slot = (place // per_block).clamp(max=count - 1)
        full = torch.where(place < n_past, past[..., slot] * per_block + place % per_block, full)
    n_stretches = -(-kv_len // size)
    full_lists = (n_past + n_own)[..., 0], full.clamp(max=n_stretches - 1)
    partial_lists = _alike((torch.ones_like(start), diagonal[:, None]), full_lists)

    full_transposed = partial_transposed = None
    if backward:
        full_transposed = _tiles_of_stretches(chosen, start, block_size, size, n_stretches)
        # The tiles on the diagonal of a stretch are neighbours.
        stretch = torch.arange(n_stretches, device=chosen.device)
        first = _tile_at(stretch * size, start)
        on_diagonal = _tile_at((stretch + 1) * size, start) - first
        neighbours = first[:, None] + torch.arange(tiles, device=chosen.device)
        partial_transposed = _alike((on_diagonal, neighbours.clamp(max=tiles - 1)), full_transposed)

    last_key = last_key_of_query(q_len, offset + q_len, chosen.device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = key <= last_key[query]
        return seen

    return block_mask_of(
        (q_len, kv_len),
        mask_mod,
        partial_lists,
        full_lists,
        partial_transposed,
        full_transposed,
        block_size=(TILE, size),
    )


def stretch_of(block_size: int) -> int:
    """Keys in one entry of the lists."""
    return stretch_size(block_size, _MAX_STRETCHES)


def _tiles_of_stretches(
    chosen: Tensor, start: Tensor, block_size: int, size: int, n_stretches: int
) -> Lists:
    """For every stretch of keys the tiles that see all of it: of its own block, then of later."""
    batch, heads, tiles, count = chosen.shape
    device = chosen.device
    n_blocks = -(-n_stretches * size // block_size)
    head = torch.arange(batch * heads, device=device)[:, None, None]
    if count > 0:  # compilers do not take sorts of nothing
        block = torch.where(chosen >= 0, chosen, n_blocks).view(batch * heads, tiles, count)
        sorted_block, pair = (block + head * (n_blocks + 1)).flatten().sort(stable=True)
        edges = torch.arange(n_blocks + 1, device=device) + head[:, 0] * (n_blocks + 1)
        first = torch.searchsorted(sorted_block, edges.to(sorted_block.dtype))
        choosing = first.diff(dim=-1)  # how many tiles chose each block
        tile = pair // count % tiles
    else:
        tile = torch.zeros(1, dtype=torch.int64, device=device)
        first = choosing = torch.zeros(batch * heads, n_blocks, dtype=torch.int64, device=device)

    stretch = torch.arange(n_stretches, device=device)
    block_of_stretch = stretch // (block_size // size)
    after = _tile_at((stretch + 1) * size, start)
    n_own = _tile_at((block_of_stretch + 1) * block_size, start) - after
    n_later = choosing[:, block_of_stretch]
    place = torch.arange(tiles, device=device)
    later = first[:, block_of_stretch, None] + (place - n_own[:, None]).clamp(min=0)
    index = torch.where(
        place < n_own[:, None], after[:, None] + place, tile[later.clamp(max=tile.shape[0] - 1)]
    )
    shape = batch, heads, n_stretches
    return (n_own + n_later).view(shape), index.clamp(max=tiles - 1).view(*shape, tiles)


def _tile_at(position: Tensor, start: Tensor) -> Tensor:
    """The first tile that stands at a position, a multiple of 128, or after it."""
    return ((position - start[0]) // TILE).clamp(0, start.shape[0])


def _alike(lists: Lists, others: Lists) -> Lists:
    """Lists for all heads in the shape of others: one kernel reads both by the same strides."""
    count, index = lists
    index = index[:, : others[1].shape[-1]].expand(*index.shape[:-1], others[1].shape[-1])
    return count.expand(others[0].shape), index.expand(others[1].shape)
