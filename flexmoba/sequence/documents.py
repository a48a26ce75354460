"""Where the sequences of a row begin, from the arguments that users pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.checks import check_longest
from flexmoba.runtime import values_readable


class Packing(NamedTuple):
    """Packed documents as `packing_of` reads them.

    Attributes:
        first_token: ``(B, L)`` ints, the first token of each token's document.
        n_documents: Documents of a row, at most.
        longest: Tokens of a document, at most.
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
    """The documents of rows of ``length`` tokens; None if neither tensor is given.

    ``document_ids`` are read, as no shape says how many documents there are; so are ``cu_seqlens``
    on CPU, where reading waits for nothing. Elsewhere ``max_seqlen`` says how long documents are.
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
    """The first token of each token's document, ``(B, L)`` ints; of two arguments one is given."""
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
    """The position of each token in its sequence, ``(B, L)`` ints; -1 for padding.

    One of the last three arguments is given.
    """
    if key_padding_mask is not None:
        return positions_of_real_tokens(key_padding_mask)
    first_token = first_tokens(length, cu_seqlens, document_ids)
    return torch.arange(length, device=first_token.device) - first_token


def positions_of_real_tokens(key_padding_mask: Tensor) -> Tensor:
    """The position of each real token among the real tokens of its row, int32; -1 for padding."""
    counted = key_padding_mask.cumsum(1, dtype=torch.int32)
    return torch.where(key_padding_mask, counted - 1, -1)
