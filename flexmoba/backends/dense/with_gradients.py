"""Full attention with gradients on CUDA, by `scaled_dot_product_attention`."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexmoba.backends.dense.on_cuda import has_exact_cudnn, with_dense_rows
from flexmoba.backends.dense.operator import fits_dense_kernels, has_gradients
from flexmoba.backends.options import AttentionOptions
from flexmoba.runtime import without_autocast


def supports_dense_gradients(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, has_score_mod: bool
) -> bool:
    """Returns whether `dense_with_gradients` supports a full attention call with gradients on CUDA.

    Its gradients may differ between two runs, so `torch.use_deterministic_algorithms` excludes it.
    A compiled function compiles again if this setting changes.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        options: The backend and its options.
        has_score_mod: Whether the call has a ``score_mod``.
    """
    return (
        q.is_cuda
        and has_gradients(q, k, v)
        and not torch.are_deterministic_algorithms_enabled()
        and fits_dense_kernels(q, k, v, options, has_score_mod=has_score_mod)
        and has_exact_cudnn()
    )


@without_autocast
def dense_with_gradients(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Computes full attention by `scaled_dot_product_attention`, with gradients.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, D)``.
        options: The options, of which ``scale`` and ``is_causal`` apply.

    Returns:
        The output ``(B, Hq, Lq, D)`` in the dtype of ``q``.
    """
    # Rows that are not dense would leave only the kernel that writes all scores.
    return scaled_dot_product_attention(
        with_dense_rows(q),
        with_dense_rows(k),
        with_dense_rows(v),
        is_causal=options.is_causal,
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
