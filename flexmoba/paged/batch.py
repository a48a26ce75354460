"""`PagedBatch`: which tokens of a ragged batch belong to which sequence and position."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.cache import MAX_STEP_QUERIES
from flexmoba.runtime import values_readable


class Chunk(NamedTuple):
    """A sequence with more new tokens than a step.

    Attributes:
        row: Its row of the block table.
        start: Its first token in the batch.
        end: The token after its last one.
        seq_len: Its length, new tokens included.
    """

    row: int
    start: int
    end: int
    seq_len: int


class PagedBatch(NamedTuple):
    """The sequences of one ragged batch, the same for every layer; from `paged_batch`.

    Attributes:
        block_table: The pages of each sequence, ``(B, N)`` int32.
        rows: The sequence of each token, ``(T,)`` int32.
        positions: The position of each token in its sequence, ``(T,)`` int32; -1 for padding.
        chunks: The sequences with more than 16 new tokens.
        steps: The tokens of all other sequences, ``(n,)`` int64; None for all tokens.
    """

    block_table: Tensor
    rows: Tensor
    positions: Tensor
    chunks: tuple[Chunk, ...] = ()
    steps: Tensor | None = None


def paged_batch(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    tokens: int,
    max_query_len: int | None = None,
) -> PagedBatch:
    """Describes a ragged batch of prefill chunks and decoding steps, once for all layers.

    The new tokens of all sequences follow each other, and those of one sequence are its last
    tokens. Sequences may share pages. With ``max_query_len`` of at most 16, the host reads nothing
    from the device, and a CUDA graph can capture the call.

    Args:
        query_start_loc: Where the new tokens of each sequence begin and where the last ones end,
            ``(B + 1,)`` int32, rising from 0. Tokens after the last boundary are padding.
        seq_lens: Tokens of each sequence, new tokens included, ``(B,)`` int32.
        block_table: The pages of each sequence in order, ``(B, N)`` int32. Entries after the last
            block of a sequence are not read.
        tokens: Tokens ``T`` of the batch, padding included.
        max_query_len: An upper bound of the number of new tokens of a sequence. None to read it
            from ``query_start_loc``.

    Returns:
        The batch, for `attend_paged`.

    Raises:
        ValueError: Shapes or dtypes do not match, or (checked on CPU only) the values do not.

    Examples:
        >>> import torch
        >>> from flexmoba.paged import paged_batch
        >>> table = torch.tensor([[7, 3], [5, 0]], dtype=torch.int32)
        >>> new = torch.tensor([0, 3, 4], dtype=torch.int32)  # three tokens, then one
        >>> lengths = torch.tensor([12, 8], dtype=torch.int32)
        >>> paged_batch(new, lengths, table, tokens=5).positions
        tensor([ 9, 10, 11,  7, -1], dtype=torch.int32)
    """
    tensors = {
        "query_start_loc": query_start_loc,
        "seq_lens": seq_lens,
        "block_table": block_table,
    }
    for name, x in tensors.items():
        if x.dtype != torch.int32 or x.device != block_table.device:
            raise ValueError(
                f"{name} must be int32 on {block_table.device} like the block table, got "
                f"{x.dtype} on {x.device}; cast or move it"
            )
    n = seq_lens.shape[0] if seq_lens.ndim == 1 else -1
    if query_start_loc.shape != (n + 1,) or block_table.ndim != 2 or block_table.shape[0] != n:
        raise ValueError(
            "query_start_loc, seq_lens and block_table must be (B + 1,), (B,) and (B, N), got "
            f"{tuple(query_start_loc.shape)}, {tuple(seq_lens.shape)} and "
            f"{tuple(block_table.shape)}; pass one row for every sequence"
        )
    token = torch.arange(tokens, device=block_table.device, dtype=torch.int32)
    ends = query_start_loc[1:]
    rows = torch.searchsorted(ends, token, right=True, out_int32=True)
    is_padding = rows == n
    if n == 0:  # all tokens are padding, of a sequence without pages
        table = block_table.new_zeros(1, max(1, block_table.shape[1]))
        return PagedBatch(table, rows, torch.full_like(token, -1))
    rows = rows.clamp(max=n - 1)
    positions = torch.where(is_padding, -1, seq_lens[rows] - ends[rows] + token)
    batch = PagedBatch(block_table, rows, positions.int())
    if values_readable(query_start_loc):
        _check_values(query_start_loc, seq_lens, tokens)
    if max_query_len is not None and max_query_len <= MAX_STEP_QUERIES:
        return batch
    starts = query_start_loc.tolist()
    chunks = tuple(
        Chunk(row, start, end, length)
        for row, (start, end, length) in enumerate(
            zip(starts, starts[1:], seq_lens.tolist(), strict=False)
        )
        if end - start > MAX_STEP_QUERIES
    )
    if not chunks:
        return batch
    is_step = torch.ones(tokens, dtype=torch.bool)
    for chunk in chunks:
        is_step[chunk.start : chunk.end] = False
    return batch._replace(chunks=chunks, steps=is_step.nonzero()[:, 0].to(block_table.device))


def _check_values(query_start_loc: Tensor, seq_lens: Tensor, tokens: int) -> None:
    new = query_start_loc.diff()
    first, last = int(query_start_loc[0]), int(query_start_loc[-1])
    if first != 0 or last > tokens or bool((new < 0).any()) or bool((new > seq_lens).any()):
        raise ValueError(
            f"query_start_loc must rise from 0 to at most {tokens} tokens, by at most seq_lens, "
            f"got {query_start_loc.tolist()} and {seq_lens.tolist()}; count new tokens in seq_lens"
        )
