"""Full attention by cuDNN and FlashAttention.

cuDNN is the fastest on Hopper. Its gradients may differ between two runs, and FlashAttention's
deterministic backward pass takes longer than FlexAttention's, which therefore computes calls with
gradients under `torch.use_deterministic_algorithms`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

# Before cuDNN 9.15.1, results were wrong for some lengths that are not multiples of 128.
_LEAST_CUDNN = 91501

_aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor]


def attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Computes `dense_attention` with cuDNN where it can, and else with FlashAttention."""
    q, k, v = (_with_dense_rows(x.detach()) for x in (q, k, v))
    if _can_use_cudnn(q, k, v, is_causal):
        options: Any = None, True, 0.0, is_causal, False
        results = _aten._scaled_dot_product_cudnn_attention(q, k, v, *options, scale=scale)
    else:
        options = 0.0, is_causal, False
        results = _aten._scaled_dot_product_flash_attention(q, k, v, *options, scale=scale)
    return results[0], results[1]


def attend_backward_on_cuda(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    scale: float,
    is_causal: bool,
) -> Inputs:
    """Computes the gradients of q, k and v with cuDNN where it can, and else with FlashAttention.

    Both take the results of either forward pass: if deterministic algorithms were enabled after it,
    torch excludes cuDNN here, and FlashAttention is deterministic. The gradient of the log-sum-exp
    takes a second call, as on CPU.
    """
    q, k, v = (_with_dense_rows(x.detach()) for x in inputs)
    differentiate = _by_cudnn if _can_use_cudnn(q, k, v, is_causal) else _by_flash
    options = lse, scale, is_causal
    grads = differentiate(_with_dense_rows(grad_out), out, (q, k, v), *options)
    if grad_lse is None:
        return grads
    column, ones = torch.zeros_like(out), torch.zeros_like(v)
    column[..., 0], ones[..., 0] = grad_lse, 1.0
    more_q, more_k, _ = differentiate(column, torch.zeros_like(out), (q, k, ones), *options)
    return grads[0] + more_q, grads[1] + more_k, grads[2]


def _can_use_cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> bool:
    grouped = q.shape[1] != k.shape[1]
    return (torch.backends.cudnn.version() or 0) >= _LEAST_CUDNN and can_use_cudnn_attention(
        SDPAParams(q, k, v, None, 0.0, is_causal, grouped)
    )


def _by_cudnn(
    grad: Tensor, out: Tensor, inputs: Inputs, lse: Tensor, scale: float, is_causal: bool
) -> Inputs:
    no_dropout = 2 * (_unused_seed(grad),)  # seed and offset
    no_bias_or_documents = None, None, None
    grads: Inputs = _aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, *inputs, out, lse[..., None], *no_dropout, *no_bias_or_documents),
        *(inputs[0].shape[2], inputs[1].shape[2], 0.0, is_causal),
        scale=scale,
    )
    return grads


def _by_flash(
    grad: Tensor, out: Tensor, inputs: Inputs, lse: Tensor, scale: float, is_causal: bool
) -> Inputs:
    no_dropout = 2 * (_unused_seed(grad),)
    grads: Inputs = _aten._scaled_dot_product_flash_attention_backward(
        *(grad, *inputs, out, lse, None, None),
        *(inputs[0].shape[2], inputs[1].shape[2], 0.0, is_causal),
        *no_dropout,
        scale=scale,
    )
    return grads


def _unused_seed(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
