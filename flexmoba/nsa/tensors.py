"""Keys and values of the branches, and the tensors of a cache."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values
Compress = Callable[[Tensor, Tensor, Tensor], Pair]


class BranchTensors(NamedTuple):
    """The keys and values of the branches.

    A cache without a window branch has no tokens of it.

    Attributes:
        k: Keys of the selected branch, ``(B, Hkv, Lk, D)``.
        v: Values of the selected branch, ``(B, Hkv, Lk, Dv)``.
        k_cmp: Compressed keys, ``(B, Hkv, blocks, D)``.
        v_cmp: Compressed values, ``(B, Hkv, blocks, Dv)``.
        k_win: Keys of the window branch, ``(B, Hkv, tokens, D)``, of the last tokens at least.
        v_win: Values of the window branch, ``(B, Hkv, tokens, Dv)``.
    """

    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor


class CacheState(NamedTuple):
    """The tensors of a cache, which `append` changes in place.

    Attributes:
        branches: Keys and values. The last block, the last compressed block and the last entry of
            the ring of the window branch take the writes that nothing reads.
        tail: The last inputs of the compression, the last token last, ``(B, Hkv, cmp_block - 1,
            D)`` and ``(B, Hkv, cmp_block - 1, Dv)``.
        lengths: Tokens in each row, ``(B,)`` int32.
    """

    branches: BranchTensors
    tail: Pair
    lengths: Tensor
