"""The fused backend as an operator with a backward pass, and the inputs that it supports."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoba.backends.operators import register_attention, without_operator
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.score_mod import ScoreMod
from flexmoba.selection import BlockSelection

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


def why_not_fused(
    q: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None,
    score_mod: ScoreMod | None = None,
    *,
    has_short_blocks: bool = False,
) -> str | None:
    """Returns the reason why the fused backend does not support these inputs, or None.

    The inputs are supported by FlexAttention: `why_not_flex` returns None for them.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        kernel_options: The caller's kernel options for FlexAttention, or None.
        score_mod: A function of every score, or None.
        has_short_blocks: Whether blocks other than the last one may be shorter than the block size.
    """
    if torch.version.hip:
        return "supports only NVIDIA GPUs"
    if q.dtype not in _DTYPES:
        return f"needs float16 or bfloat16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > _MAX_HEAD_DIM:
        return f"needs head dims of at most {_MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"
    if kernel_options:
        return (
            f"does not support kernel_options={dict(kernel_options)}, which are for FlexAttention"
        )
    if has_short_blocks:
        return "does not support documents or padding with is_causal=False"
    return None if score_mod is None else "does not support score_mod"


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Computes `block_attention` with Triton kernels.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16 or bfloat16, on CUDA.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        selection: The blocks of each query; all blocks but the last one must be full.
        options: The options, of which ``scale`` and ``is_causal`` apply.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32.
    """
    assert selection.keys_of_block is None
    scale = options.scale
    if scale < 0:  # the kernels scale the maximum of the unscaled scores
        q, scale = -q, -scale
    out, lse = _attend_if_plain(
        *(q, k, v, selection.routed, selection.own, selection.block_size, scale),
        options.is_causal,
    )
    return out, lse


def _attend_and_keep(*inputs: Any) -> tuple[Tensor, ...]:
    """Returns the output, the log-sum-exp, and the sorted pairs if the backward pass can use them.

    The inputs are those of `_attend_here`, which leaves out the pairs: an operator cannot return
    tensors whose number depends on the sizes of a call.
    """
    from flexmoba.backends.fused.forward import attend_on_cuda

    q, k, v, routed, own, block_size, scale, is_causal = inputs
    selection = BlockSelection(routed, block_size, own)
    out, lse, rows = attend_on_cuda(q, k, v, selection, scale, is_causal)
    return (out, lse) if rows is None else (out, lse, *rows)


def _attend_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _attend_and_keep(q, k, v, routed, own, block_size, scale, is_causal)
    return out, lse


def _differentiate_here(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _differentiate_kept(
        *(grad_out, grad_lse, out, lse, q, k, v, routed, own, block_size, scale, is_causal)
    )


def _differentiate_kept(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *inputs: Any,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    from flexmoba.backends.fused.backward import attend_backward_on_cuda
    from flexmoba.backends.fused.routing import Rows

    q, k, v, routed, own, block_size, scale, is_causal = inputs
    return attend_backward_on_cuda(
        *(grad_out, grad_lse, (out, lse), (q, k, v)),
        *(BlockSelection(routed, block_size, own), scale, is_causal),
        Rows(*kept) if kept else None,
    )


# torch.compile does not trace an operator, so results inside and outside torch.compile are equal.
# The arguments are flat because the schema of an operator has no tuples.
_attend = torch.library.custom_op("flexmoba::attend_fused", _attend_here, mutates_args=())
_differentiate = torch.library.custom_op(
    "flexmoba::attend_fused_backward", _differentiate_here, mutates_args=()
)
register_attention(_attend, _differentiate, n_tensors=5)
_attend_if_plain = without_operator(
    _attend, _differentiate, _attend_and_keep, _differentiate_kept, n_tensors=5
)
