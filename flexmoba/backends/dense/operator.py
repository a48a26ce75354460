"""Full attention as an operator with a backward pass, and the inputs that it supports."""

from typing import Any

import torch
from torch import Tensor

from flexmoba.backends.dense.on_cpu import attend_backward_on_cpu, attend_on_cpu
from flexmoba.backends.dense.on_cuda import attend_on_cuda
from flexmoba.backends.operators import register_attention, without_operator
from flexmoba.backends.options import AttentionOptions
from flexmoba.runtime import without_autocast

_DTYPES_ON_CUDA = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM_ON_CUDA = 256


def supports_dense(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, has_score_mod: bool
) -> bool:
    """Returns whether `dense_attention` supports a full attention call.

    On CUDA, it does not support gradients.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        options: The backend and its options.
        has_score_mod: Whether the call has a ``score_mod``.
    """
    fits = fits_dense_kernels(q, k, v, options, has_score_mod=has_score_mod)
    return fits and not (q.is_cuda and has_gradients(q, k, v))


def fits_dense_kernels(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, has_score_mod: bool
) -> bool:
    """Returns whether torch's dense kernels compute a full attention call.

    ``impl="masked"`` never uses them: it names a FlexAttention call. The arguments are those of
    `supports_dense`.
    """
    # The kernels align the first query to the first key. They mask scores, or take their maximum,
    # before they scale.
    is_aligned = not options.is_causal or q.shape[2] == k.shape[2]
    if has_score_mod or not is_aligned or options.scale <= 0:
        return False
    if q.device.type == "cpu":
        return options.impl == "portable"
    dim, value_dim = q.shape[-1], v.shape[-1]
    return (
        q.is_cuda
        and options.impl in ("fused", "routed")
        and not options.kernel_options
        and q.dtype in _DTYPES_ON_CUDA
        and dim == value_dim
        and dim % 8 == 0
        and dim <= _MAX_HEAD_DIM_ON_CUDA
        and not torch.version.hip
        and torch.cuda.get_device_properties(q.device).major >= 8
    )


def has_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Returns whether autograd records a call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Computes full attention with torch's dense kernels.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        options: The options, of which ``scale`` and ``is_causal`` apply.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32 (float64 for float64 inputs).
    """
    out, lse = _attend_if_plain(q, k, v, options.scale, options.is_causal)
    return out, lse


@without_autocast
def _attend_here(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    attend = attend_on_cuda if q.is_cuda else attend_on_cpu
    out, lse = attend(q, k, v, scale, is_causal)
    return _laid_out(out, _out_like(q, v, "meta")), lse.reshape(q.shape[:3]).contiguous()


@without_autocast
def _differentiate_here(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert q.device.type == "cpu", "calls with gradients on CUDA have another backend"
    grads = attend_backward_on_cpu(grad_out, grad_lse, out, lse, (q, k, v), scale, is_causal)
    empty = (torch.empty_like(x, device="meta") for x in (q, k, v))
    d_q, d_k, d_v = (_laid_out(x, like) for x, like in zip(grads, empty, strict=True))
    return d_q, d_k, d_v


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return _out_like(q, v, q.device), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# An operator, because autograd of torch's operators has no gradient of the log-sum-exp, and because
# the choice of a kernel reads versions and, on CPU, values.
_attend = torch.library.custom_op("flexmoba::attend_dense", _attend_here, mutates_args=())
_differentiate = torch.library.custom_op(
    "flexmoba::attend_dense_backward", _differentiate_here, mutates_args=()
)
register_attention(_attend, _differentiate, n_tensors=3, fake=_fake, fake_backward=_fake_backward)
_attend_if_plain = without_operator(
    _attend, _differentiate, _attend_here, _differentiate_here, n_tensors=3
)


def _out_like(q: Tensor, v: Tensor, device: torch.device | str) -> Tensor:
    """Returns an empty output, in the layout of ``q`` if it has the head dim last.

    The output of cuDNN has this layout.
    """
    if q.shape[-1] == v.shape[-1] and q.stride(-1) == 1:
        return torch.empty_like(q, device=device)
    return q.new_empty((*q.shape[:3], v.shape[-1]), device=device)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Returns ``x`` or a copy, with the dtype and the strides of a tensor on the meta device."""
    if x.dtype == like.dtype and x.stride() == like.stride():
        return x
    empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=x.device)
    return empty.copy_(x)
