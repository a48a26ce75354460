"""Copies of rows by a map whose inverse is known: the gradient is a gather too, without atomics.

Autograd's own gradient of a gather adds atomically, in an order that varies between runs. Here the
inverse map gives the backward pass a gather and a sum of fixed order.
"""

from typing import Any

import torch
from torch import Tensor


def copy_rows(x: Tensor, source_of_row: Tensor, rows_of_source: Tensor) -> Tensor:
    """Copies rows, zeros where a row has no source; differentiable in ``x``.

    Args:
        x: ``(N, D)``.
        source_of_row: ``(rows,)`` int32, which row of ``x`` each row copies; -1 for none.
        rows_of_source: ``(N, copies)`` int32, the inverse map: the rows that copy each row of
            ``x``; -1 for none.

    Returns:
        ``(rows, D)``.
    """
    rows: Tensor = _CopyRows.apply(x, source_of_row, rows_of_source)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(rows: Tensor, rows_of_source: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted sum of some rows, in float32 at least and in the order of the columns.

    Args:
        rows: ``(rows, D)``.
        rows_of_source: ``(N, copies)`` int32, which rows to add; -1 for none.
        weights: ``(N, copies)``, what each is multiplied by; 1 by default.

    Returns:
        ``(N, D)``.
    """
    total = None
    for i, row in enumerate(rows_of_source.unbind(1)):  # one pass over memory, once compiled
        part = _gather(rows, row).to(torch.promote_types(rows.dtype, torch.float32))
        part = part if weights is None else part * weights[:, i, None]
        total = part if total is None else total + part
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
    """Rows of ``x`` by index; zeros where the index is -1, whatever the first row holds."""
    return x.index_select(0, index.clamp(min=0)).masked_fill((index < 0)[:, None], 0.0)
