"""Arithmetic of blocks of keys and tiles of queries, for all rooms."""

from typing import TypeVar

import torch
from torch import Tensor

# Queries in a tile. It is the query block size of a BlockMask, and the number of queries that share
# a selection under gate="tile". Before torch 2.14, FlexAttention on CUDA supports only multiples.
TILE = 128

_Number = TypeVar("_Number", int, Tensor)


def ceil_div(a: _Number, b: int) -> _Number:
    """Returns the quotient ``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """Returns the smallest power of two that is at least ``x``, which is at least 1.

    `triton.next_power_of_2` and `triton.cdiv` take as long as a launch, because they also serve the
    compiler.
    """
    return 1 << (x - 1).bit_length()


def own_block(q_len: int, kv_len: int, block_size: int, device: torch.device) -> Tensor:
    """Returns the own block of each query, ``(Lq,)`` int32; the last query is at the last key."""
    return ((torch.arange(q_len, device=device) + (kv_len - q_len)) // block_size).int()
