"""Blocks of keys and tiles of queries: the arithmetic that every room shares."""

from typing import TypeVar

import torch
from torch import Tensor

# Queries in a tile: the query block of a BlockMask, and the queries that share a selection under
# gate="tile". Before torch 2.14 FlexAttention takes multiples of it alone on CUDA.
TILE = 128

_Number = TypeVar("_Number", int, Tensor)


def ceil_div(a: _Number, b: int) -> _Number:
    """The quotient ``a / b`` rounded up."""
    return -(-a // b)


def own_block(q_len: int, kv_len: int, block_size: int, device: torch.device) -> Tensor:
    """The block that contains each query, ``(Lq,)`` int32; the last query is at the last key."""
    return ((torch.arange(q_len, device=device) + (kv_len - q_len)) // block_size).int()
