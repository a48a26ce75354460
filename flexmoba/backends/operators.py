"""The registrations that the attention operators share: fake results and the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoba.runtime import is_plain_call, no_second_derivatives

Attention = Callable[..., tuple[Tensor, Tensor]]
AttentionAndKept = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


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
    operator.register_autograd(_derivative(backward), setup_context=_saving(n_tensors))
    backward.register_autograd(no_second_derivatives)


def without_operator(
    operator: Any,
    backward: Any,
    function: AttentionAndKept,
    backward_function: Backward,
    *,
    n_tensors: int,
) -> Attention:
    """Returns the operator, which plain eager calls replace by its function, with derivatives.

    An operator takes some 30 us on the host before its function begins.

    Args:
        operator: The operator, as in `register_attention`.
        backward: The operator of its backward pass.
        function: The function of ``operator``. It may return further tensors.
        backward_function: The function of ``backward``, with the further tensors, if any, as the
            keyword argument ``kept``.
        n_tensors: Number of leading tensors among the inputs.
    """
    derivative = _derivative(backward_function, passes_kept=True)
    derivative_by_operator = _derivative(backward)
    save = _saving(n_tensors)

    class Eager(torch.autograd.Function):
        # Without `setup_context`, because torch would then bind the arguments to the signature of
        # `forward` at every call.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            out, lse, *kept = function(*inputs)
            save(ctx, inputs, (out, lse), kept)
            return out, lse

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # With create_graph=True, the operator raises an error for second derivatives.
            is_plain = is_plain_call(*(x for x in grads if x is not None))
            plain = is_plain and not torch.is_grad_enabled()
            return (derivative if plain else derivative_by_operator)(ctx, *grads)

    def attend(*inputs: Any) -> tuple[Tensor, Tensor]:
        if not is_plain_call(*inputs[:3]):
            return operator(*inputs)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:3]):
            return Eager.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
        out, lse, *_ = function(*inputs)
        return out, lse

    return attend


def _saving(n_tensors: int) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any, kept: Sequence[Tensor] = ()) -> None:
        ctx.set_materialize_grads(False)  # zeros for the log-sum-exp would cost a launch
        ctx.save_for_backward(*output, *inputs[:n_tensors], *kept)
        ctx.numbers, ctx.n_kept = inputs[n_tensors:], len(kept)

    return save


def _derivative(
    backward: Backward, *, passes_kept: bool = False
) -> Callable[..., tuple[Tensor | None, ...]]:
    def differentiate(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once, because a checkpoint recomputes them
        saved, kept = saved[: len(saved) - ctx.n_kept], saved[len(saved) - ctx.n_kept :]
        if grad_out is None:
            grad_out = torch.zeros_like(saved[0])
        further = {"kept": kept} if passes_kept and kept else {}
        grads = backward(grad_out, grad_lse, *saved, *ctx.numbers, **further)
        n_inputs = len(saved) - 2 + len(ctx.numbers)
        return (*grads, *(None for _ in range(n_inputs - 3)))

    return differentiate


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
