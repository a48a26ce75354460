"""The registrations that the attention operators share: fake results and the backward pass."""

from typing import Any

import torch
from torch import Tensor

from flexmoba.runtime import no_second_derivatives


def register_attention(operator: Any, backward: Any, *, n_tensors: int) -> None:
    """Registers fake results and derivatives of an attention operator.

    Args:
        operator: A custom operator ``(q, k, v, ...) -> (out, lse)``.
        backward: The custom operator ``(grad_out, grad_lse, out, lse, *inputs) -> (d_q, d_k, d_v)``
            with the inputs of ``operator``.
        n_tensors: Number of leading tensors, optional ones included, among the inputs.
    """
    operator.register_fake(_fake)
    backward.register_fake(_fake_backward)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[:n_tensors])
        ctx.numbers = inputs[n_tensors:]

    def differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        grads = backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
        return (*grads, *(None for _ in range(n_tensors - 3 + len(ctx.numbers))))

    operator.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(no_second_derivatives)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
