"""The merge: combines the partial outputs of each query by their log-sum-exps, without atomics.

Every query has one row for each partial output. The map between queries and rows is known in both
directions (`routing.Tiles`), so the backward pass is a gather as well.
"""

from typing import Any

import torch
from torch import Tensor

from flexmoba.rows import sum_rows


def merge_partial_outputs(
    out_rows: Tensor, lse_rows: Tensor, query_of_row: Tensor, row_of_pair: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the partial outputs of each query by online softmax (arXiv 2502.13189, Alg. 1, l. 16).

    Args:
        out_rows: ``(rows, Dv)``, the attention of each row over its block of keys.
        lse_rows: ``(rows,)`` float32, its log-sum-exp; -inf if the row sees no key.
        query_of_row: ``(rows,)`` int32, the query of each row; -1 for padding.
        row_of_pair: ``(N, pairs)`` int32, the rows of each of ``N`` queries; -1 for none.

    Returns:
        The output ``(N, Dv)`` in the dtype of ``out_rows`` and its log-sum-exp ``(N,)``. A query
        without rows gets zeros and -inf.
    """
    merged: tuple[Tensor, Tensor] = _Merge.apply(  # type: ignore[no-untyped-call]
        out_rows, lse_rows, query_of_row, row_of_pair
    )
    return merged


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_rows: Tensor, lse_rows: Tensor, query_of_row: Tensor, row_of_pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = merge_forward(out_rows, lse_rows, row_of_pair)
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
        # The queries of padding rows are zeros, but NaN or inf in a block reaches their outputs.
        d_lse = torch.where(query_of_row >= 0, d_lse, 0.0)
        return (grad * weight[:, None]).to(out_rows.dtype), d_lse, None, None


def merge_forward(out_rows: Tensor, lse_rows: Tensor, row_of_pair: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `merge_partial_outputs` without gradients."""
    pair_lse = torch.where(row_of_pair >= 0, lse_rows[row_of_pair.clamp(min=0).long()], -torch.inf)
    highest = pair_lse.amax(-1)
    # If a query sees no key, its log-sum-exps are all -inf. Subtracting 0 then gives weights of 0
    # instead of NaN.
    weights = torch.exp(pair_lse - torch.where(highest == -torch.inf, 0.0, highest)[:, None])
    # The sum has a fixed order, so that pairs of weight 0 do not change its rounding.
    total = sum(weights.unbind(1)[1:], weights[:, 0])
    shares = weights / torch.where(total == 0, 1.0, total)[:, None]
    out = sum_rows(out_rows, row_of_pair, shares)
    # copy=True because torch 2.11 loses the gradients of a compiled autograd.Function that ends in
    # a cast to the same dtype.
    return out.to(out_rows.dtype, copy=True), highest + torch.log(total)


def merge_two(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Merges two partial outputs of every query; differentiable.

    Args:
        out: ``(..., Dv)``, the first partial output.
        lse: ``(...)``, its log-sum-exp.
        other: ``(..., Dv)``, the second partial output.
        other_lse: ``(...)``, its log-sum-exp.
        _: Ignored; `flex.run_compiled` passes ``kernel_options`` to every function.

    Returns:
        The output ``(..., Dv)`` in the dtype of ``out`` and its log-sum-exp ``(...)``.
    """
    total = torch.logaddexp(lse, other_lse)
    # If a query sees no key, both are -inf. Subtracting 0 then gives weights of 0 instead of NaN.
    origin = total.masked_fill(total == float("-inf"), 0.0)
    shares = (torch.exp(x - origin)[..., None] for x in (lse, other_lse))
    weighted = (x * share for x, share in zip((out, other), shares, strict=True))
    return sum(weighted, torch.zeros((), device=out.device)).to(out.dtype), total
