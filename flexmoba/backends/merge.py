"""Merges the partial outputs of each query by their log-sum-exps, without atomics.

Every query has one row for each partial output, and the map between them is known in both
directions (`routing.Tiles`), so that the backward pass is a gather as well.
"""

from typing import Any

import torch
from torch import Tensor

from flexmoba.rows import sum_rows


def combine(
    out_rows: Tensor, lse_rows: Tensor, query_of_row: Tensor, row_of_pair: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the parts of each query by online softmax (arXiv 2502.13189, Alg. 1, line 16).

    Args:
        out_rows: ``(rows, Dv)``, each row's attention over its own block of keys.
        lse_rows: ``(rows,)`` float32, its log-sum-exp of scores; -inf if it saw nothing.
        query_of_row: ``(rows,)`` int32, -1 for padding.
        row_of_pair: ``(N, parts)`` int32, -1 where a query has no such part.

    Returns:
        The output ``(N, Dv)`` in the dtype of ``out_rows`` and its log-sum-exp ``(N,)``. A query
        without parts gets zeros and -inf.
    """
    merged: tuple[Tensor, Tensor] = _Combine.apply(  # type: ignore[no-untyped-call]
        out_rows, lse_rows, query_of_row, row_of_pair
    )
    return merged


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_rows: Tensor, lse_rows: Tensor, query_of_row: Tensor, row_of_pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = merge_parts(out_rows, lse_rows, row_of_pair)
        ctx.save_for_backward(out, lse, out_rows, lse_rows, query_of_row)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out, lse, out_rows, lse_rows, query_of_row = ctx.saved_tensors
        precise = torch.promote_types(out_rows.dtype, torch.float32)
        delta = (grad_out.to(precise) * out.to(precise)).sum(-1) - grad_lse
        query = query_of_row.clamp(min=0).long()
        weight = torch.exp(lse_rows - lse[query])
        weight = torch.where((query_of_row >= 0) & (lse_rows > float("-inf")), weight, 0.0)
        grad = grad_out[query].to(precise)
        d_lse = weight * ((grad * out_rows.to(precise)).sum(-1) - delta[query])
        # Padding computes with zero queries, but its sums may hold what its block's keys hold.
        d_lse = torch.where(query_of_row >= 0, d_lse, 0.0)
        return (grad * weight[:, None]).to(out_rows.dtype), d_lse, None, None


def merge_parts(out_rows: Tensor, lse_rows: Tensor, row_of_pair: Tensor) -> tuple[Tensor, Tensor]:
    """`combine` without gradients."""
    lse_parts = torch.where(row_of_pair >= 0, lse_rows[row_of_pair.clamp(min=0).long()], -torch.inf)
    highest = lse_parts.amax(-1)
    # Where nothing was seen every part is -inf: subtract 0 to get weights of 0, not NaN.
    weights = torch.exp(lse_parts - torch.where(highest == -torch.inf, 0.0, highest)[:, None])
    total = sum(weights.unbind(1)[1:], weights[:, 0])  # in order, so that empty parts are nothing
    shares = weights / torch.where(total == 0, 1.0, total)[:, None]
    out = sum_rows(out_rows, row_of_pair, shares)
    # copy=True: torch 2.11 compiles an autograd.Function that ends in a cast to the dtype it has
    # already into one without gradients.
    return out.to(out_rows.dtype, copy=True), highest + torch.log(total)


def merge_two(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Merges two parts of every query's attention, ``(..., Dv)`` and ``(...)``; differentiable.

    Other arguments are those that `flex.run_compiled` gives to all functions, of no use here.
    """
    total = torch.logaddexp(lse, other_lse)
    # Where nothing was seen both are -inf: subtract 0 to get weights of 0, not NaN.
    origin = total.masked_fill(total == float("-inf"), 0.0)
    shares = (torch.exp(x - origin)[..., None] for x in (lse, other_lse))
    parts = (x * share for x, share in zip((out, other), shares, strict=True))
    return sum(parts, torch.zeros((), device=out.device)).to(out.dtype), total
