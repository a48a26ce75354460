"""Full attention with its log-sum-exp, without gradients, by cuDNN and FlashAttention."""

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

# Before cuDNN 9.15.1, results were wrong for some lengths that are not multiples of 128.
_LEAST_CUDNN = 91501

_aten = torch.ops.aten


def attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Computes `dense_attention` with cuDNN where it can, and else with FlashAttention."""
    q, k, v = (with_dense_rows(x.detach()) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if has_exact_cudnn() and can_use_cudnn_attention(
        SDPAParams(q, k, v, None, 0.0, is_causal, grouped)
    ):
        options: Any = None, True, 0.0, is_causal, False
        results = _aten._scaled_dot_product_cudnn_attention(q, k, v, *options, scale=scale)
    else:
        options = 0.0, is_causal, False
        results = _aten._scaled_dot_product_flash_attention(q, k, v, *options, scale=scale)
    return results[0], results[1]


# A compiled function takes the result as a constant, instead of tracing how torch loads cuDNN.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_exact_cudnn() -> bool:
    """Returns whether cuDNN's attention is exact for every length."""
    return (torch.backends.cudnn.version() or 0) >= _LEAST_CUDNN


def with_dense_rows(x: Tensor) -> Tensor:
    """Returns ``x``, or a copy if the head dim is not the innermost one in memory."""
    return x if x.stride(3) == 1 else x.contiguous()
