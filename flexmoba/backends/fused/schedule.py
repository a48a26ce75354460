"""The split of a fused call into pieces, so that its buffers are small beside q and the output.

A *tile* holds at most `QUERY_TILE` consecutive queries of one head; tiles are counted over all
heads. A *sort group* holds the tiles whose pairs are sorted together. A *piece* holds the tiles of
a sort group whose partial outputs, the largest buffers, exist at the same time.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

QUERY_TILE = 64

# Limits of the memory for sorting, and for all buffers and the selection together, as multiples of
# the size of q and the output.
_SORTING_SHARE, _TOTAL_SHARE = 0.4, 1.0
# Bytes below which neither limit applies: the host limits the speed of such calls, so they need few
# launches.
_SMALL = 2**28
# Bytes for each pair while it is sorted (its bin before and after, its index, and buffers of the
# sort), after it is sorted, and in the selection.
_SORTING_BYTES = 24
_SORTED_BYTES = 8
_SELECTION_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call. ``count`` is the number of columns of the routed selection."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    block_size: int
    count: int
    dim: int
    value_dim: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, routed: Tensor, block_size: int) -> "Sizes":
        """Returns the sizes of a call of `fused_attention` with these tensors."""
        batch, heads, q_len, dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        count, value_dim = routed.shape[3], v.shape[3]
        return Sizes(batch, heads, kv_heads, q_len, kv_len, block_size, count, dim, value_dim)

    @property
    def group(self) -> int:
        """Returns the number of query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def n_blocks(self) -> int:
        """Returns the number of blocks of a KV head."""
        return -(-self.kv_len // self.block_size)


# An item of the gradients of keys holds this many times the average number of rows of a block. The
# factor is large enough that few blocks need a second item, and small enough that a block that most
# queries selected is divided among several programs.
ITEM_FACTOR = 4


def rows_of_items(n_rows: int, n_blocks: int, least: int, items: int) -> int:
    """Returns the number of rows of an item, for the gradients of keys.

    Args:
        n_rows: Rows of all blocks.
        n_blocks: Blocks of all KV heads.
        least: The least number of rows of an item.
        items: Number of items that occupy a GPU to the end of a short call.
    """
    return max(least, min(ITEM_FACTOR * (n_rows // n_blocks), n_rows // items))


class Piece(NamedTuple):
    """Queries whose partial outputs exist at the same time, and the blocks of their KV heads."""

    first_tile: int
    n_tiles: int
    first_query: int
    n_queries: int
    first_block: int  # counted over the KV heads of the sort group
    n_blocks: int


class SortGroup(NamedTuple):
    """Queries whose pairs are sorted together."""

    first_query: int
    n_queries: int
    first_kv_head: int
    n_kv_heads: int
    pieces: list[Piece]

    @property
    def max_queries(self) -> int:
        """Returns the number of queries in the largest piece."""
        return max(piece.n_queries for piece in self.pieces)


@functools.lru_cache(maxsize=1024)
def sort_groups(sizes: Sizes, query_bytes: int, *, whole_kv_heads: bool = False) -> list[SortGroup]:
    """Returns the sort groups of a call, each with its pieces.

    Sort groups and pieces hold as many KV heads as the limits of memory allow, at least one. If not
    even one fits, each sort group has one piece, with some of the queries of a KV head.

    Args:
        sizes: The sizes of the call.
        query_bytes: The bytes of the buffers of a piece for each of its queries.
        whole_kv_heads: Whether a piece must not divide a KV head, even if it does not fit.
    """
    tiles_per_head = -(-sizes.q_len // QUERY_TILE)
    per_kv_head, n_kv_heads = sizes.group * tiles_per_head, sizes.batch * sizes.kv_heads
    n_tiles = n_kv_heads * per_kv_head
    # Bytes of one query of every tile: q and the output in half precision, and the limits.
    size = 2 * (sizes.dim + sizes.value_dim) * n_tiles
    for_sorting, in_total = (
        max(share * size, _SMALL / QUERY_TILE) for share in (_SORTING_SHARE, _TOTAL_SHARE)
    )
    max_tiles_in_group = int(for_sorting / max(_SORTING_BYTES * sizes.count, 1))
    sorted_size = sizes.count * (
        _SELECTION_BYTES * n_tiles
        + _SORTED_BYTES * min(n_tiles, max(max_tiles_in_group, per_kv_head))
    )
    max_tiles_in_piece = max(1, int((in_total - sorted_size) / max(query_bytes, 1)))
    if max_tiles_in_piece < per_kv_head and not whole_kv_heads:
        return [
            _sort_group(sizes, [tiles])
            for first in range(0, n_kv_heads * per_kv_head, per_kv_head)
            for tiles in _even_ranges(first, first + per_kv_head, max_tiles_in_piece)
        ]
    heads_in_piece = max(1, max_tiles_in_piece // per_kv_head)
    heads_in_group = max(heads_in_piece, max_tiles_in_group // per_kv_head)
    return [
        _sort_group(
            sizes,
            [
                (x * per_kv_head, y * per_kv_head)
                for x, y in _even_ranges(start, end, heads_in_piece)
            ],
        )
        for start, end in _even_ranges(0, n_kv_heads, heads_in_group)
    ]


def _even_ranges(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Returns consecutive ranges of nearly equal length, none longer than ``most``."""
    n = -(-(end - start) // max(1, most))
    return itertools.pairwise(start + (end - start) * i // n for i in range(n + 1))


def _sort_group(sizes: Sizes, tiles: list[tuple[int, int]]) -> SortGroup:
    def query(tile: int) -> int:
        head, tile = divmod(tile, -(-sizes.q_len // QUERY_TILE))
        return head * sizes.q_len + tile * QUERY_TILE

    def kv_head(query: int) -> int:
        return query // (sizes.group * sizes.q_len)

    first_query, end_query = query(tiles[0][0]), query(tiles[-1][1])
    first_head, end_head = kv_head(first_query), kv_head(end_query - 1) + 1
    pieces = []
    for start, end in tiles:
        first, last = query(start), query(end) - 1
        first_block = (kv_head(first) - first_head) * sizes.n_blocks
        n_blocks = (kv_head(last) + 1 - kv_head(first)) * sizes.n_blocks
        pieces.append(Piece(start, end - start, first, last + 1 - first, first_block, n_blocks))
    return SortGroup(
        first_query, end_query - first_query, first_head, end_head - first_head, pieces
    )
