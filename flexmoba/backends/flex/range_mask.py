"""The mask of queries that each see a range of keys, such as the compressed branch of NSA."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexmoba.backends.flex.block_masks import block_mask_of, lists_of, materialize
from flexmoba.blocks import TILE, ceil_div
from flexmoba.runtime import HAS_TRITON


def range_mask(
    first_key: Tensor | None, end_key: Tensor, kv_len: int, *, backward: bool
) -> BlockMask:
    """Returns the mask of ranges of keys, which neither begin nor end earlier for later queries.

    Args:
        first_key: ``(B, Lq)`` int32, the first key that each query sees, or None for key 0.
        end_key: ``(Lq,)`` int32, the end of the keys that each query sees. A query whose range ends
            at or before its first key sees none.
        kv_len: Number of keys, at least as many as the last query sees.
        backward: Whether the mask has the transposed lists.
    """
    counts_and_entries = range_lists(first_key, end_key, kv_len, backward)
    end = materialize(end_key)  # see `selection_mask`
    start = None if first_key is None else materialize(first_key)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible: Tensor = key < end[query]
        return visible if start is None else visible & (key >= start[b, query])

    lists = list(zip(counts_and_entries[::2], counts_and_entries[1::2], strict=True))
    transposed = lists[2:] if backward else (None, None)
    return block_mask_of((end_key.shape[0], kv_len), mask_mod, *lists[:2], *transposed)


# An operator, because Inductor of torch 2.11 does not compile these lists for CUDA if the number of
# stretches is symbolic: it fails with CantSplit (tests/test_gpu_nsa.py, "long compressed blocks").
@torch.library.custom_op("flexmoba::range_lists", mutates_args=())
def range_lists(
    first_key: Tensor | None, end_key: Tensor, kv_len: int, backward: bool
) -> list[Tensor]:
    """Returns count and entries of the partial and the full lists, then of the transposed ones.

    Without ``backward``, there are no transposed lists.
    """
    if end_key.is_cuda and HAS_TRITON:
        from flexmoba.backends.flex.range_kernel import range_lists_on_cuda

        lists = range_lists_on_cuda(first_key, end_key, kv_len, transposed=False)
        if backward:
            lists += range_lists_on_cuda(first_key, end_key, kv_len, transposed=True)
        return lists
    q_len, device = end_key.shape[0], end_key.device
    first_row = torch.arange(ceil_div(q_len, TILE), device=device) * TILE
    last_row = (first_row + TILE - 1).clamp(max=q_len - 1)
    begin = torch.arange(ceil_div(kv_len, TILE), device=device) * TILE  # of the stretches of keys
    first = torch.zeros_like(end_key)[None] if first_key is None else first_key
    lowest, highest = (first[:, None, rows, None] for rows in (first_row, last_row))
    visited = (begin < end_key[last_row, None]) & (begin + TILE > lowest)
    visited = visited & (lowest < end_key[last_row, None])
    is_full = (begin + TILE <= end_key[first_row, None]) & (begin >= highest)
    # Short tiles and stretches at the ends are partial, so that the kernel checks their bounds.
    is_full = is_full & (begin + TILE <= kv_len) & (first_row[:, None] + TILE <= q_len)
    listed = [visited & ~is_full, is_full]
    if backward:
        listed += [x.mT for x in listed]
    return [x.int().contiguous() for y in listed for x in lists_of(y)]


@range_lists.register_fake
def _(first_key: Tensor | None, end_key: Tensor, kv_len: int, backward: bool) -> list[Tensor]:
    tiles, stretches = ceil_div(end_key.shape[0], TILE), ceil_div(kv_len, TILE)
    batch = 1 if first_key is None else first_key.shape[0]
    shapes = [(tiles, stretches)] * 2 + [(stretches, tiles)] * (2 if backward else 0)
    return [
        end_key.new_empty(batch, 1, *sizes)
        for rows, columns in shapes
        for sizes in [(rows,), (rows, columns)]
    ]
