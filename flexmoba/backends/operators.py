"""The registrations that the attention operators share: fake results and the backward pass."""

from typing import Any

import torch
from torch import Tensor

from flexmoba.runtime import no_second_derivatives


def register_attention(
    operator: Any,
    backward: Any,
    *,
    n_tensors: int,
    fake: Any = None,
    fake_backward: Any = None,
) -> None:
    """Registers fake results and derivatives of an attention operator.

    Args:
        operator: A custom operator ``(q, k, v, ...) -> (out, lse)``.
        backward: The custom operator ``(grad_out, grad_lse, out, lse, *inputs) -> (d_q, d_k, d_v)``
            with the inputs of ``operator``. ``grad_lse`` is None if no loss uses the log-sum-exp.
        n_tensors: Number of leading tensors, optional ones included, among the inputs.
        fake: The function of fake results of ``operator``; contiguous results by default.
        fake_backward: The function of fake results of ``backward``; contiguous by default.
    """
    operator.register_fake(fake or _fake)
    backward.register_fake(fake_backward or _fake_backward)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # zeros for the log-sum-exp would cost a launch
        ctx.save_for_backward(*output, *inputs[:n_tensors])
        ctx.numbers = inputs[n_tensors:]

    def differentiate(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            grad_out = torch.zeros_like(ctx.saved_tensors[0])
        grads = backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
        return (*grads, *(None for _ in range(n_tensors - 3 + len(ctx.numbers))))

    operator.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(no_second_derivatives)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
