"""The mask of ``gate="tile"``, in which 128 queries that share a selection are a tile of queries.

The call needs no sorting, gathering or merging, and past blocks are full stretches, without masked
pairs. The lists are exact, and `mask_mod` masks only the causal diagonal. The mask is therefore
only for compiled FlexAttention; without compilation, FlexAttention ignores the lists.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends.flex.block_masks import Lists, block_mask_of, last_key_of_query, stretch_size
from flexmoba.blocks import TILE

# Per block. With more stretches, the partly masked stretch on the diagonal of each tile is shorter,
# but the lists of the backward pass are longer.
_MAX_STRETCHES = 4


def tile_gate_mask(
    selected: Tensor, q_len: int, kv_len: int, block_size: int, *, backward: bool
) -> BlockMask:
    """Returns the causal mask of tiles of queries that attend to their own and selected blocks.

    Args:
        selected: ``(B, Hq, Lq / 128, T)`` int32, distinct past blocks of each tile; -1 for none.
        q_len: Number of queries, a multiple of 128. They are the last ones of ``kv_len`` rounded up
            to full tiles.
        kv_len: Number of keys.
        block_size: Keys in a block, a multiple of 128.
        backward: Whether the mask has the transposed lists.
    """
    tiles, count = selected.shape[2:]
    offset = -(-kv_len // TILE) * TILE - q_len
    size = stretch_of(block_size)
    per_block = block_size // size
    # The position of the first query of each tile.
    start = offset + torch.arange(tiles, device=selected.device) * TILE
    own_first = start // block_size * per_block  # in stretches
    diagonal = start // size

    # The full stretches: past blocks in ascending order, then the own block before the diagonal.
    none = torch.iinfo(torch.int32).max
    past = torch.where(selected >= 0, selected, none).sort(-1).values
    n_past = (selected >= 0).sum(-1, keepdim=True) * per_block
    n_own = (diagonal - own_first)[:, None]
    entry = torch.arange((count + 1) * per_block, device=selected.device)
    full = own_first[:, None] + (entry - n_past).clamp(min=0)
    if count > 0:
        column = (entry // per_block).clamp(max=count - 1)
        full = torch.where(entry < n_past, past[..., column] * per_block + entry % per_block, full)
    n_stretches = -(-kv_len // size)
    full_lists = (n_past + n_own)[..., 0], full.clamp(max=n_stretches - 1)
    partial_lists = _expand_like((torch.ones_like(start), diagonal[:, None]), full_lists)

    full_transposed = partial_transposed = None
    if backward:
        full_transposed = _tiles_of_stretches(selected, start, block_size, size, n_stretches)
        # The tiles whose diagonal is in a stretch are consecutive.
        stretch = torch.arange(n_stretches, device=selected.device)
        first = _tile_at(stretch * size, start)
        on_diagonal = _tile_at((stretch + 1) * size, start) - first
        neighbours = first[:, None] + torch.arange(tiles, device=selected.device)
        partial_transposed = _expand_like(
            (on_diagonal, neighbours.clamp(max=tiles - 1)), full_transposed
        )

    last_key = last_key_of_query(q_len, offset + q_len, selected.device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible: Tensor = key <= last_key[query]
        return visible

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
    """Returns the number of keys in a stretch of `tile_gate_mask`."""
    return stretch_size(block_size, _MAX_STRETCHES)


def _tiles_of_stretches(
    selected: Tensor, start: Tensor, block_size: int, size: int, n_stretches: int
) -> Lists:
    """Returns the tiles that see all of each stretch: tiles of its block, then later tiles."""
    batch, heads, tiles, count = selected.shape
    device = selected.device
    n_blocks = -(-n_stretches * size // block_size)
    head = torch.arange(batch * heads, device=device)[:, None, None]
    if count > 0:  # compilers do not support sorts of empty tensors
        block = torch.where(selected >= 0, selected, n_blocks).view(batch * heads, tiles, count)
        sorted_block, pair = (block + head * (n_blocks + 1)).flatten().sort(stable=True)
        edges = torch.arange(n_blocks + 1, device=device) + head[:, 0] * (n_blocks + 1)
        first = torch.searchsorted(sorted_block, edges.to(sorted_block.dtype))
        n_selecting = first.diff(dim=-1)  # the number of tiles that selected each block
        tile = pair // count % tiles
    else:
        tile = torch.zeros(1, dtype=torch.int64, device=device)
        first = n_selecting = torch.zeros(batch * heads, n_blocks, dtype=torch.int64, device=device)

    stretch = torch.arange(n_stretches, device=device)
    block_of_stretch = stretch // (block_size // size)
    after = _tile_at((stretch + 1) * size, start)
    n_own = _tile_at((block_of_stretch + 1) * block_size, start) - after
    n_later = n_selecting[:, block_of_stretch]
    entry = torch.arange(tiles, device=device)
    later = first[:, block_of_stretch, None] + (entry - n_own[:, None]).clamp(min=0)
    index = torch.where(
        entry < n_own[:, None], after[:, None] + entry, tile[later.clamp(max=tile.shape[0] - 1)]
    )
    shape = batch, heads, n_stretches
    return (n_own + n_later).view(shape), index.clamp(max=tiles - 1).view(*shape, tiles)


def _tile_at(position: Tensor, start: Tensor) -> Tensor:
    """Returns the first tile at or after a position, which is a multiple of 128."""
    return ((position - start[0]) // TILE).clamp(0, start.shape[0])


def _expand_like(lists: Lists, others: Lists) -> Lists:
    """Expands lists to the shape of others, because a kernel reads both with the same strides."""
    count, index = lists
    index = index[:, : others[1].shape[-1]].expand(*index.shape[:-1], others[1].shape[-1])
    return count.expand(others[0].shape), index.expand(others[1].shape)
