"""The routed implementation: tiles of queries of one block each, through one FlexAttention call."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.flex import call_flex, run_compiled
from flexmoba.masks import GRAIN, tile_mask
from flexmoba.merge import combine, dispatch
from flexmoba.routing import most_rows, route

# Before torch 2.14 FlexAttention's backward pass reaches rows by 32-bit offsets; larger calls are
# cut into pieces, which then also bound the memory.
_MAX_ELEMENTS = 2**31 - 1


def attend_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its routed blocks and, if causal, its own.

    Args:
        q: ``(B, Hq, Lq, D)``.
        k: ``(B, Hkv, Lk, D)``.
        v: ``(B, Hkv, Lk, Dv)``.
        routed: ``(B, Hq, Lq, T)`` int32, block indices, as `routing.route` wants them.
        own: ``(B, Hq, Lq)`` bool, which queries attend to their own block; None for all of them.
        block_size: Keys in a block.
        scale: Factor on the scores.
        kernel_options: FlexAttention's kernel options.
        is_causal: Whether queries attend to their own blocks, causally, beside the routed ones.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.
    """
    static: dict[str, Any] = {
        "block_size": block_size,
        "scale": scale,
        "kernel_options": kernel_options,
        "is_causal": is_causal,
    }
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rows = most_rows(routed.shape, kv_heads, kv_len, block_size, is_causal=is_causal)
    if rows * max(q.shape[-1], v.shape[-1]) <= _MAX_ELEMENTS or q_len == heads == 1:
        return run_compiled(_attend_routed_tiles, q, k, v, routed, own, **static)

    # In two halves, each of which may be halved again: of the KV heads of all batch elements, of
    # the query heads of one of them, or of the queries of one of those.
    if batch * kv_heads > 1:
        q, k, v, routed = (x.flatten(0, 1)[None] for x in (q, k, v, routed))
        own = own if own is None else own.flatten(0, 1)[None]
        kv_middle = (batch * kv_heads + 1) // 2
        dim, middle = 1, kv_middle * (heads // kv_heads)
        kv_halves = zip(k.split(kv_middle, dim), v.split(kv_middle, dim), strict=True)
    elif heads > 1:
        dim, middle = 1, (heads + 1) // 2
        kv_halves = zip((k, k), (v, v), strict=True)
    else:
        dim, middle = 2, (q_len + 1) // 2
        past = kv_len - q_len + middle if is_causal else kv_len
        kv_halves = zip((k[:, :, :past], k), (v[:, :, :past], v), strict=True)
    q_halves, routed_halves = q.split(middle, dim), routed.split(middle, dim)
    own_halves = (None, None) if own is None else own.split(middle, dim)
    results = [
        attend_routed(q_half, *kv_half, routed_half, own_half, **static)
        for q_half, kv_half, routed_half, own_half in zip(
            q_halves, kv_halves, routed_halves, own_halves, strict=True
        )
    ]
    out, lse = (torch.cat(parts, dim) for parts in zip(*results, strict=True))
    return out.view(batch, heads, q_len, -1), lse.view(batch, heads, q_len)


def _attend_routed_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    own: Tensor | None,
    *,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    kv_heads, kv_len = k.shape[1:3]
    block_stride = -(-block_size // GRAIN) * GRAIN
    tiles = route(
        routed, own, kv_heads, kv_len, block_size, block_stride, is_causal=is_causal, fuse=True
    )
    mask = tile_mask(
        tiles,
        q.shape,
        kv_heads,
        kv_len,
        block_size,
        block_stride,
        is_causal=is_causal,
        backward=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )
    rows = dispatch(q.reshape(-1, q.shape[-1]), tiles.query_of_row, tiles.row_of_pair)
    keys, values = (_blocks_in_a_row(x, block_size, block_stride) for x in (k, v))
    out_rows, lse_rows = call_flex(
        rows.view(1, 1, -1, q.shape[-1]), keys, values, mask, scale, kernel_options, divisible=True
    )
    out, lse = combine(
        out_rows.view(-1, v.shape[-1]), lse_rows.view(-1), tiles.query_of_row, tiles.row_of_pair
    )
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _blocks_in_a_row(x: Tensor, block_size: int, block_stride: int) -> Tensor:
    """``(B, H, L, D)`` as one sequence ``(1, 1, all blocks, D)``, short blocks padded."""
    if x.shape[2] % block_size != 0:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % block_size))
    if block_stride != block_size:
        x = F.pad(x.unflatten(2, (-1, block_size)), (0, 0, 0, block_stride - block_size))
    return x.reshape(1, 1, -1, x.shape[-1])
