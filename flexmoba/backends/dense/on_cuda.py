"""Full attention by cuDNN and FlashAttention.

cuDNN is the fastest forward pass on Hopper. Its backward pass adds gradients of queries in any
order, and torch has no option to change that. The backward pass is therefore FlashAttention's, in
its deterministic mode.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.utils import deterministic

# Before cuDNN 9.15.1, results were wrong for some lengths that are not multiples of 128.
_LEAST_CUDNN = 91501

_aten = torch.ops.aten
_lock = threading.Lock()  # autograd has a thread for each device, and the mode is one for all


def attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Computes `dense_attention` with cuDNN where it can, and else with FlashAttention."""
    q, k, v = (_with_dense_rows(x.detach()) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if (torch.backends.cudnn.version() or 0) >= _LEAST_CUDNN and can_use_cudnn_attention(
        SDPAParams(q, k, v, None, 0.0, is_causal, grouped)
    ):
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
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v.

    The gradient ``g`` of the log-sum-exp contributes ``g P`` to the gradient of the scores, where
    ``P`` are the weights. This is the gradient of attention to values of one for the gradient ``g``
    of an output of zero, so it takes a second call. In half precision, ``g`` is the sum of two
    columns.
    """
    q, k, v = (_with_dense_rows(x) for x in inputs)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout

    def differentiate(grad: Tensor, out: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = None, None, q.shape[2], k.shape[2]
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
            *(grad, q, k, v, out, lse, *sizes, 0.0, is_causal, unused, unused), scale=scale
        )
        return grads

    with _deterministic():
        d_q, d_k, d_v = differentiate(_with_dense_rows(grad_out), out, v)
        if grad_lse is not None:
            columns = torch.zeros_like(out)
            columns[..., 0] = grad_lse
            columns[..., 1] = grad_lse - columns[..., 0]
            ones = torch.zeros_like(v)
            ones[..., :2] = 1.0
            more_q, more_k, _ = differentiate(columns, torch.zeros_like(out), ones)
            d_q, d_k = d_q + more_q, d_k + more_k
    return d_q, d_k, d_v


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Sets torch's deterministic mode, in which FlashAttention has a deterministic backward."""
    settings: Any = deterministic  # mypy does not know its property
    with _lock:
        mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
        try:
            settings.fill_uninitialized_memory = False  # every element is written
            torch.set_deterministic_debug_mode("error")
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            settings.fill_uninitialized_memory = fill
