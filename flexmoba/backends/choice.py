"""Chooses the backend that serves given inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexmoba.backends.flex import why_not_flex
from flexmoba.backends.fused import why_not_fused
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
    uneven: bool = False,
) -> str | None:
    """Why an implementation cannot serve these inputs; None if it can.

    ``uneven`` says that blocks other than the last one may be short.
    """
    if impl == "portable":
        return None
    if impl == "masked" and q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "has no gradients on CPU, FlexAttention offers none there"
        return "runs on CPU only outside torch.compile" if torch.compiler.is_compiling() else None
    reason = why_not_flex(q, v)
    if reason is None and impl == "fused":
        reason = why_not_fused(q, v, kernel_options, score_mod, uneven=uneven)
    return reason


def resolve(
    impl: ImplName,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
    *,
    tiles_choose: bool = False,
    uneven: bool = False,
) -> ImplName:
    """The implementation that serves these inputs; never another than the one named.

    ``tiles_choose`` says that `tile_gate_attention` may serve, the fastest where it can;
    ``uneven`` is that of `why_not`.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "auto":
        fast: tuple[ImplName, ...] = ("fused", "routed")
        for better in ("masked", *fast) if tiles_choose else fast:
            if why_not(better, q, k, v, kernel_options, score_mod, uneven=uneven) is None:
                return better
        return "portable"
    reason = why_not(impl, q, k, v, kernel_options, score_mod, uneven=uneven)
    if reason:
        raise NotImplementedError(f'impl="{impl}" {reason}; use impl="auto" or "portable"')
    return impl
