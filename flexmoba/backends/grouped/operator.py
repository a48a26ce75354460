"""Attention over a shared selection as an operator with a backward pass, and its inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexmoba.backends.flex import why_not_flex
from flexmoba.backends.operators import register_attention, without_operator
from flexmoba.backends.score_mod import ScoreMod

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
# A matrix product has at least 16 rows. With fewer heads, sorting the queries by block is faster.
_LEAST_GROUP, _MOST_GROUP = 8, 128


def supports_grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    *,
    has_short_blocks: bool = False,
) -> bool:
    """Returns whether these kernels support the inputs.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        kernel_options: The caller's kernel options for FlexAttention, or None.
        score_mod: A function of every score, or None.
        has_short_blocks: Whether blocks other than the last one may be shorter than the block size.
    """
    return (
        why_not_flex(q, v) is None
        and torch.version.hip is None
        and q.dtype in _DTYPES
        and max(q.shape[-1], v.shape[-1]) <= _MAX_HEAD_DIM
        and _LEAST_GROUP <= q.shape[1] // k.shape[1] <= _MOST_GROUP
        and not kernel_options
        and score_mod is None
        and not has_short_blocks
    )


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Computes attention to blocks that the query heads of a KV head share, with Triton kernels.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16 or bfloat16, on CUDA.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        selected: Block indices, ``(B, Hkv, Lq, topk)`` int32, -1 for none. The own block is listed
            like any other.
        block_size: Keys in a block. All blocks but the last one are full.
        scale: Factor on the scores.
        is_causal: Whether a query attends only to keys at or before its position.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` in the dtype of ``q`` and the log-sum-exp ``(B, Hq, Lq)``,
        float32.
    """
    if scale < 0:  # the kernels scale the maximum of the unscaled scores
        q, scale = -q, -scale
    out, lse = _attend_if_plain(q, k, v, selected, block_size, scale, is_causal)
    return out, lse


def _attend_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    from flexmoba.backends.grouped.launches import attend_on_cuda

    return attend_on_cuda(q, k, v, selected, block_size, scale, is_causal=is_causal)


def _differentiate_here(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from flexmoba.backends.grouped.launches import attend_backward_on_cuda

    return attend_backward_on_cuda(
        *((grad_out, grad_lse), (out, lse), (q, k, v), selected, block_size, scale),
        is_causal=is_causal,
    )


# torch.compile does not trace an operator, so results inside and outside torch.compile are equal.
_attend = torch.library.custom_op("flexmoba::attend_grouped", _attend_here, mutates_args=())
_attend_backward = torch.library.custom_op(
    "flexmoba::attend_grouped_backward", _differentiate_here, mutates_args=()
)
register_attention(_attend, _attend_backward, n_tensors=4)
_attend_if_plain = without_operator(
    _attend, _attend_backward, _attend_here, _differentiate_here, n_tensors=4
)
