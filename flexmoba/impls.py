"""The implementations: which one serves given inputs, and its call."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flexmoba.flex import run_compiled, why_not_compiled
from flexmoba.fused import attend_fused, why_not_fused
from flexmoba.gate import own_block
from flexmoba.masked import attend_dense, attend_masked, attend_windows
from flexmoba.merge import merge_two
from flexmoba.modified import attend_modified
from flexmoba.portable import attend_portable
from flexmoba.routed import attend_routed
from flexmoba.routing import TILE, route
from flexmoba.score_mod import Modifier, ScoreMod, modifier_of
from flexmoba.sequence import InPlace

ImplName = Literal["auto", "fused", "routed", "masked", "portable"]
IMPLS: tuple[ImplName, ...] = get_args(ImplName)

_LEAST_TILE = 16  # rows of a tile of plain tensor operations: a vector of most CPUs
_SHORTEST_PIECE, _LONGEST_PIECE = 64, 512  # keys that windows are cut into for them


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
    reason = why_not_compiled(q, v)
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

    ``tiles_choose`` says that `masked.attend_shared` may serve, the fastest where it can;
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
    keys_of_block: Tensor | None = None,
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
        keys_of_block: ``(B, blocks)`` int32, as in `gate.Candidates`; not for ``"fused"``.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.
    """
    if keys_of_block is not None:
        keys_of_block = keys_of_block[:, None].expand(-1, k.shape[1], -1)
    if impl == "masked":
        selection = routed
        if is_causal:
            here = own_block(q.shape[2], k.shape[2], block_size, q.device)
            here = here.expand(q.shape[:3]) if own is None else torch.where(own, here, -1)
            selection = torch.cat([here[..., None], routed], dim=-1)
        return attend_masked(
            *(q, k, v, selection, block_size, scale, kernel_options, is_causal, modifier),
            keys_of_block,
        )
    if impl == "fused":
        assert keys_of_block is None
        return attend_fused(q, k, v, routed, own, block_size, scale, is_causal)
    if impl == "routed":
        return attend_routed(
            *(q, k, v, routed, own, block_size, scale, kernel_options, is_causal, modifier),
            keys_of_block,
        )
    return _attend_portably(
        q, k, v, routed, own, block_size, scale, is_causal, modifier, keys_of_block=keys_of_block
    )


def _attend_portably(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    is_causal: bool,
    modifier: Modifier | None,
    *,
    keys_of_block: Tensor | None = None,
    first_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_blocks` by plain tensor operations, from the key ``first_key (B, Lq)`` on."""
    kv_heads, kv_len = k.shape[1:3]
    # Short blocks fill short tiles: so many queries stand in a block.
    queries = q.shape[1] // kv_heads * block_size
    tile = TILE
    while tile > _LEAST_TILE and queries <= tile // 2:  # of a length that compilers keep symbolic
        tile //= 2
    tiles = route(
        *(routed, own, kv_heads, kv_len, block_size, block_size),
        is_causal=is_causal,
        fuse=False,
        tile=tile,
        keys_of_block=keys_of_block,
    )
    if modifier is not None:
        return attend_modified(q, k, v, tiles, block_size, scale, modifier, first_key)
    return attend_portable(q, k, v, tiles, block_size, scale, first_key)


def attend_fully(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    impl: str,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention, by the fastest means of the named implementation."""
    if impl == "portable":  # one block of everything
        routed = torch.zeros((*q.shape[:3], int(not is_causal)), dtype=torch.int32, device=q.device)
        return attend_blocks(
            q, k, v, routed, None, k.shape[2], scale, impl, None, is_causal, modifier
        )
    return attend_dense(q, k, v, scale, kernel_options, is_causal, modifier)


def attend_from(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    longest: int,
    scale: float,
    impl: str,
    kernel_options: Mapping[str, Any] | None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention from the key ``first_key (B, L)`` on, of as many queries as keys.

    First keys never fall along a row, and no query sees more than ``longest`` keys. Time and memory
    are those of the keys seen.
    """
    length = k.shape[2]
    # Compiled code depends on it, so few values.
    longest = min(length, 1 << (longest - 1).bit_length())
    if impl != "portable":
        return attend_windows(q, k, v, first_key, longest, scale, kernel_options, modifier)
    size = min(length, max(_SHORTEST_PIECE, min(_LONGEST_PIECE, longest)))
    own = own_block(length, length, size, q.device)[:, None]
    past = own - 1 - torch.arange(-(-(longest - 1) // size), device=q.device)
    past = torch.where(past * size + size > first_key[..., None], past, -1).int()
    routed = past[:, None].expand(-1, q.shape[1], -1, -1)
    return _attend_portably(q, k, v, routed, None, size, scale, True, modifier, first_key=first_key)


def attend_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    where: InPlace,
    scale: float,
    impl: str,
    kernel_options: Mapping[str, Any] | None,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """`attend_blocks` of documents that stay in place; ``routed`` are full blocks before the own.

    Own blocks and past blocks are attended to apart, and merged by their log-sum-exps.
    """
    modifier = modifier_of(score_mod, q, k, None)
    blocks = where.full_blocks
    out, lse = attend_from(
        q, k, v, where.first_key, blocks.block_size, scale, impl, kernel_options, modifier
    )
    if own is not None:
        out = torch.where(own[..., None], out, 0.0)
        lse = torch.where(own, lse, float("-inf"))
    if routed.shape[-1] == 0:
        return out, lse
    if modifier is not None:
        position = blocks.token_of_slot.clamp(min=0)[:, None].expand(-1, k.shape[1], -1)
        modifier = modifier._replace(key_position=position, moved=True)
    k, v = blocks.spread(k), blocks.spread(v)
    past, past_lse = attend_blocks(
        *(q, k, v, routed, None, blocks.block_size, scale, impl, kernel_options, False, modifier)
    )
    if impl == "portable":
        return merge_two(out, lse, past, past_lse)
    return run_compiled(merge_two, out, lse, past, past_lse, kernel_options=None)  # in one pass
