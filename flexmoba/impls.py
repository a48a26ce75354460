"""The implementations: which one serves given inputs, and its call."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flexmoba.flex import why_not_compiled
from flexmoba.fused import attend_fused, why_not_fused
from flexmoba.gate import own_block
from flexmoba.masked import attend_dense, attend_masked
from flexmoba.modified import attend_modified
from flexmoba.portable import attend_portable
from flexmoba.routed import attend_routed
from flexmoba.routing import route
from flexmoba.score_mod import Modifier, ScoreMod

ImplName = Literal["auto", "fused", "routed", "masked", "portable"]
IMPLS: tuple[ImplName, ...] = get_args(ImplName)


def why_not(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_options: Mapping[str, Any] | None = None,
    score_mod: ScoreMod | None = None,
) -> str | None:
    """Why an implementation cannot serve these inputs; None if it can."""
    if impl == "portable":
        return None
    if impl == "masked" and q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "has no gradients on CPU, FlexAttention offers none there"
        return "runs on CPU only outside torch.compile" if torch.compiler.is_compiling() else None
    reason = why_not_compiled(q, v)
    if reason is None and impl == "fused":
        reason = why_not_fused(q, v, kernel_options, score_mod)
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
) -> ImplName:
    """The implementation that serves these inputs; never another than the one named.

    ``tiles_choose`` says that `masked.attend_shared` may serve, the fastest where it can.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "auto":
        fast: tuple[ImplName, ...] = ("fused", "routed")
        for better in ("masked", *fast) if tiles_choose else fast:
            if why_not(better, q, k, v, kernel_options, score_mod) is None:
                return better
        return "portable"
    reason = why_not(impl, q, k, v, kernel_options, score_mod)
    if reason:
        raise NotImplementedError(f'impl="{impl}" {reason}; use impl="auto" or "portable"')
    return impl


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    impl: str,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its routed blocks and, if causal, its own.

    Args:
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, Lk, D)``.
        v: ``(B, Hkv, Lk, Dv)``.
        routed: ``(B, Hq, Lq, T)`` int32, block indices without duplicates in a row; -1 for none.
            If causal, all of them before the query's own block.
        own: ``(B, Hq, Lq)`` bool, which queries attend to their own block; None for all of them.
        block_size: Keys in a block.
        scale: Factor on the scores.
        impl: The implementation, which must be able to serve.
        kernel_options: FlexAttention's kernel options.
        is_causal: Whether queries attend to their own blocks, causally, beside the routed ones.
        modifier: What becomes of the scores; None for nothing.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.
    """
    if impl == "masked":
        selection = routed
        if is_causal:
            here = own_block(q.shape[2], k.shape[2], block_size, q.device)
            here = here.expand(q.shape[:3]) if own is None else torch.where(own, here, -1)
            selection = torch.cat([here[..., None], routed], dim=-1)
        return attend_masked(
            q, k, v, selection, block_size, scale, kernel_options, is_causal, modifier
        )
    if impl == "fused":
        return attend_fused(q, k, v, routed, own, block_size, scale, is_causal)
    if impl == "routed":
        return attend_routed(
            q, k, v, routed, own, block_size, scale, kernel_options, is_causal, modifier
        )
    kv_heads, kv_len = k.shape[1:3]
    tiles = route(
        routed, own, kv_heads, kv_len, block_size, block_size, is_causal=is_causal, fuse=False
    )
    if modifier is not None:
        return attend_modified(q, k, v, tiles, block_size, scale, modifier)
    return attend_portable(q, k, v, tiles, block_size, scale)


def attend_fully(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_seen: Tensor | None,
    scale: float,
    impl: str,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention, by what serves it best among the named implementation's means.

    ``first_seen`` is that of `masks.full_mask`; ``"portable"`` does not serve it.
    """
    if impl == "portable":  # one block of everything
        assert first_seen is None
        routed = torch.zeros((*q.shape[:3], int(not is_causal)), dtype=torch.int32, device=q.device)
        return attend_blocks(
            q, k, v, routed, None, k.shape[2], scale, impl, None, is_causal, modifier
        )
    return attend_dense(q, k, v, first_seen, scale, kernel_options, is_causal, modifier)
