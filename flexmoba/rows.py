"""Copies of rows by an index whose inverse is known, with deterministic gradients.

The gradient of torch's gather adds with atomics, in an order that varies between runs. Given the
inverse index, the backward pass is instead a gather and a sum of fixed order.
"""

from typing import Any

import torch
from torch import Tensor


def copy_rows(x: Tensor, source_of_row: Tensor, rows_of_source: Tensor) -> Tensor:
    """Copies rows of ``x``; a row without a source is zero. Differentiable in ``x``.

    Args:
        x: ``(N, D)``, floating point.
        source_of_row: ``(rows,)`` int32, the row of ``x`` that each row copies; -1 for none.
        rows_of_source: ``(N, copies)`` int32, the inverse index: the rows that copy each row of
            ``x``; -1 for none.

    Returns:
        ``(rows, D)`` in the dtype of ``x``.
    """
    rows: Tensor = _CopyRows.apply(x, source_of_row, rows_of_source)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(rows: Tensor, rows_of_source: Tensor, weights: Tensor | None = None) -> Tensor:
    """Computes weighted sums of rows, each in the order of the columns of ``rows_of_source``.

    Args:
        rows: ``(rows, D)``, floating point.
        rows_of_source: ``(N, copies)`` int32, the rows to add; -1 for none.
        weights: ``(N, copies)``, the factor of each row; 1 by default.

    Returns:
        ``(N, D)``, in float32 (float64 for float64 rows).
    """
    total = None
    # Column by column, because the compiler fuses the sum into one pass over memory.
    for i, row in enumerate(rows_of_source.unbind(1)):
        term = _gather(rows, row).to(torch.promote_types(rows.dtype, torch.float32))
        term = term if weights is None else term * weights[:, i, None]
        total = term if total is None else total + term
    assert total is not None  # there is at least one column
    return total


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source_of_row: Tensor, rows_of_source: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_source)
        return _gather(x, source_of_row)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (rows_of_source,) = ctx.saved_tensors
        return sum_rows(grad_rows, rows_of_source).to(grad_rows.dtype), None, None


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Returns rows of ``x`` by index, and zeros for index -1, even if row 0 holds NaN."""
    return x.index_select(0, index.clamp(min=0)).masked_fill((index < 0)[:, None], 0.0)
