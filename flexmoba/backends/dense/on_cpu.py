"""Full attention by torch's CPU kernel.

Half precision is computed in float32. The kernel multiplies weights of 0 by masked values, and
0 * inf is NaN. Rows that see a large element are therefore computed by the portable backend, and
the kernel gets zeros in place of large elements. No row depends on keys that it does not see.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.portable import full_attention, full_attention_backward, is_within
from flexmoba.blocks import ceil_div

_VECTOR = 16  # elements

_aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor]


def attend_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Computes `dense_attention`; the results have the dtype of the inputs or float32."""
    limit = _limit(q, scale)
    inputs = _prepare(q, k, v)
    if all(is_within(limit, x) for x in inputs):
        return _attend(inputs, v.shape[-1], scale, is_causal)
    sees_large, inputs = _without_large(inputs, limit, is_causal)
    out, lse = _attend(inputs, v.shape[-1], scale, is_causal)
    options = AttentionOptions("portable", scale, is_causal)
    large_out, large_lse = full_attention(q, k, v, options)
    out = torch.where(sees_large[..., None], large_out.to(out.dtype), out)
    return out, torch.where(sees_large, large_lse, lse)


def attend_backward_on_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    scale: float,
    is_causal: bool,
) -> Inputs:
    """Computes the gradients of q, k and v.

    The gradient ``g`` of the log-sum-exp contributes ``g P`` to the gradient of the scores, where
    ``P`` are the weights. This is the gradient of attention to values of one for the gradient ``g``
    of an output of zero, so it takes a second call.
    """
    q, k, v = inputs
    limit = _limit(q, scale)
    prepared = _prepare(q, k, v)
    if all(is_within(limit, x) for x in prepared):
        return _differentiate(grad_out, grad_lse, out, lse, inputs, prepared, scale, is_causal)
    sees_large, prepared = _without_large(prepared, limit, is_causal)
    rest = [x.masked_fill(sees_large[..., None], 0.0) for x in (grad_out, out)]
    lse_rest = lse.masked_fill(sees_large, 0.0)
    grad_lse_rest = None if grad_lse is None else grad_lse.masked_fill(sees_large, 0.0)
    d_q, d_k, d_v = _differentiate(
        rest[0], grad_lse_rest, rest[1], lse_rest, inputs, prepared, scale, is_causal
    )
    options = AttentionOptions("portable", scale, is_causal)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    large = full_attention_backward(grad_out, grad_lse, out, lse, inputs, options)
    # The rows that see a large element have a part in the gradients of the keys that they see.
    seen = sees_large.unflatten(1, (k.shape[1], -1)).any(2)
    if is_causal:
        seen = seen.flip(-1).cumsum(-1).flip(-1) > 0
    else:
        seen = seen.any(-1, keepdim=True).expand(k.shape[:3])
    rows = sees_large, seen, seen
    d_q, d_k, d_v = (
        torch.where(rows[..., None], x.to(y.dtype), y)
        for rows, x, y in zip(rows, large, (d_q, d_k, d_v), strict=True)
    )
    return d_q, d_k, d_v


def _attend(inputs: Inputs, value_dim: int, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *inputs, 0.0, is_causal, scale=scale
    )
    return out[..., :value_dim], lse


def _differentiate(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    prepared: Inputs,
    scale: float,
    is_causal: bool,
) -> Inputs:
    q, k, v = prepared

    def differentiate(grad: Tensor, out: Tensor, v: Tensor) -> Inputs:
        grads: Inputs = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )
        return grads

    padded_grad, padded_out = (_pad(x.to(q.dtype), q.shape[-1]) for x in (grad_out, out))
    d_q, d_k, d_v = differentiate(padded_grad, padded_out, v)
    if grad_lse is not None:
        column = torch.zeros_like(q)
        column[..., 0] = grad_lse
        ones = torch.zeros_like(v)
        ones[..., 0] = 1.0
        more_q, more_k, _ = differentiate(column, torch.zeros_like(q), ones)
        d_q, d_k = d_q + more_q, d_k + more_k
    return _gathered(d_q, inputs[0]), _gathered(d_k, inputs[1]), _gathered(d_v, inputs[2])


def _prepare(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Returns q, k and v in at least float32, with one head dim and one number of heads.

    Rows are full vectors, because a matrix product may round a row differently at another
    alignment.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    dim = ceil_div(max(q.shape[-1], v.shape[-1]), _VECTOR) * _VECTOR
    group = q.shape[1] // k.shape[1]
    q, k, v = (_pad(x.detach().to(precise), dim) for x in (q, k, v))
    if group > 1:  # torch 2.11 documents no grouped heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return q, k, v


def _pad(x: Tensor, dim: int) -> Tensor:
    """Returns ``x`` with zeros up to a head dim, which the kernel requires to be contiguous."""
    return F.pad(x, (0, dim - x.shape[-1])).contiguous()


def _gathered(grad: Tensor, like: Tensor) -> Tensor:
    """Returns the sum of the gradients of a group of heads, without padding."""
    grad = grad[..., : like.shape[-1]]
    if grad.shape[1] != like.shape[1]:
        grad = grad.unflatten(1, (like.shape[1], -1)).sum(2)
    return grad


def _limit(q: Tensor, scale: float) -> float:
    """Returns the magnitude up to which no score overflows before the softmax."""
    highest = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max
    return math.sqrt(highest / (q.shape[-1] * max(1.0, abs(scale))))


def _without_large(inputs: Inputs, limit: float, is_causal: bool) -> tuple[Tensor, Inputs]:
    """Returns the rows that see a large element, and the inputs with zeros in place of these."""
    small_q, small_k, small_v = (x.abs() <= limit for x in inputs)
    is_large = (~(small_k.all(-1) & small_v.all(-1))).int()
    if is_causal:
        seen = is_large.cumsum(-1) > 0
    else:
        seen = is_large.any(-1, keepdim=True).expand(small_q.shape[:3])
    q, k, v = (
        x.where(small, 0.0) for x, small in zip(inputs, (small_q, small_k, small_v), strict=True)
    )
    return seen | ~small_q.all(-1), (q, k, v)
