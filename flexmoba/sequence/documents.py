"""Reads the documents and the positions of tokens from the arguments of users."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.checks import check_longest
from flexmoba.runtime import values_readable


class Packing(NamedTuple):
    """Packed documents of every row, from `packing_of`.

    Attributes:
        first_token: ``(B, L)`` ints, the index of the first token of each token's document.
        n_documents: An upper bound of the documents of a row.
        longest: An upper bound of the tokens of a document.
    """

    first_token: Tensor
    n_documents: int
    longest: int


def packing_of(
    length: int,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    max_seqlen: int | None = None,
) -> Packing | None:
    """Returns the documents of rows of ``length`` tokens; None if neither tensor is given.

    It reads ``document_ids`` to count the documents, and ``cu_seqlens`` on CPU, where that does not
    wait for a device. On other devices, ``max_seqlen`` bounds the lengths of ``cu_seqlens``.
    """
    if cu_seqlens is None and document_ids is None:
        return None
    first_token = first_tokens(length, cu_seqlens, document_ids)
    if cu_seqlens is not None:
        longest = length
        if values_readable(cu_seqlens):
            longest = max(1, int(cu_seqlens.diff().max()))
        elif max_seqlen is not None:
            torch._assert_async(
                cu_seqlens.diff().max() <= max_seqlen, "a document is longer than max_seqlen"
            )
            longest = min(max_seqlen, length)
        return Packing(first_token, cu_seqlens.shape[0] - 1, longest)
    token = torch.arange(length, device=first_token.device)
    sizes = [(first_token == token).sum(1).max(), (token - first_token).max() + 1]
    n_documents, longest = torch.stack(sizes).tolist()
    check_longest(longest, max_seqlen)
    return Packing(first_token, n_documents, longest)


def first_tokens(length: int, cu_seqlens: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Returns the first token of each token's document, ``(B, L)`` ints, from either argument."""
    if cu_seqlens is not None:
        token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens, token, right=True) - 1
        return cu_seqlens[document][None]
    assert document_ids is not None
    token = torch.arange(length, device=document_ids.device)
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(starts, token, 0).cummax(1).values


def positions_of(
    length: int,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Returns the position of each token in its sequence, ``(B, L)`` ints; -1 for padding.

    Exactly one of the last three arguments must be given.
    """
    if key_padding_mask is not None:
        return positions_of_real_tokens(key_padding_mask)
    first_token = first_tokens(length, cu_seqlens, document_ids)
    return torch.arange(length, device=first_token.device) - first_token


def positions_of_real_tokens(key_padding_mask: Tensor) -> Tensor:
    """Returns positions among the real tokens of each row, ``(B, L)`` int32; -1 for padding."""
    count = key_padding_mask.cumsum(1, dtype=torch.int32)
    return torch.where(key_padding_mask, count - 1, -1)
