"""The choice of a backend that supports the inputs of a call."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexmoba.backends.flex import why_not_flex
from flexmoba.backends.fused import why_not_fused
from flexmoba.backends.grouped import supports_grouped
from flexmoba.backends.options import IMPLS, ImplName
from flexmoba.backends.score_mod import ScoreMod


def why_not(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    *,
    has_short_blocks: bool = False,
) -> str | None:
    """Returns the reason why a backend does not support these inputs, or None if it does.

    Args:
        impl: The name of the backend, not ``"auto"``.
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        kernel_options: The caller's kernel options for FlexAttention, or None.
        score_mod: A function of every score, or None.
        has_short_blocks: Whether blocks other than the last one may be shorter than the block size.

    Returns:
        The end of a sentence that begins with the name of the backend, or None.
    """
    if impl == "portable":
        return None
    if impl == "masked" and q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "has no gradients on CPU, because FlexAttention has none there"
        return "runs on CPU only outside torch.compile" if torch.compiler.is_compiling() else None
    reason = why_not_flex(q, v)
    if reason is None and impl == "fused":
        reason = why_not_fused(q, v, kernel_options, score_mod, has_short_blocks=has_short_blocks)
    return reason


def resolve(
    impl: ImplName,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    *,
    use_tile_gate: bool = False,
    has_short_blocks: bool = False,
) -> ImplName:
    """Returns the backend for these inputs: the named one, or for ``"auto"`` the fastest.

    Args:
        impl: The value of the caller's ``impl`` argument.
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        kernel_options: The caller's kernel options for FlexAttention, or None.
        score_mod: A function of every score, or None.
        use_tile_gate: Whether ``"auto"`` may return ``"masked"``, which then calls
            `tile_gate_attention`, the fastest where it is possible.
        has_short_blocks: Whether blocks other than the last one may be shorter than the block size.

    Raises:
        ValueError: No backend has this name.
        NotImplementedError: The named backend does not support these inputs.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "auto":
        fast: tuple[ImplName, ...] = ("fused", "routed")
        for candidate in ("masked", *fast) if use_tile_gate else fast:
            reason = why_not(
                *(candidate, q, k, v, kernel_options, score_mod), has_short_blocks=has_short_blocks
            )
            if reason is None:
                return candidate
        return "portable"
    reason = why_not(impl, q, k, v, kernel_options, score_mod, has_short_blocks=has_short_blocks)
    if reason:
        raise NotImplementedError(f'impl="{impl}" {reason}; use impl="auto" or "portable"')
    return impl


def resolve_shared(
    impl: ImplName,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    *,
    has_short_blocks: bool = False,
) -> ImplName:
    """Computes `resolve` for a selection that the query heads of a KV head share.

    The fused backend then supports further inputs; see `supports_grouped`.
    """
    options = kernel_options, score_mod
    is_grouped = supports_grouped(q, k, v, *options, has_short_blocks=has_short_blocks)
    if impl in ("auto", "fused") and is_grouped:
        return "fused"
    return resolve(impl, q, k, v, *options, has_short_blocks=has_short_blocks)
