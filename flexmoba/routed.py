"""The routed implementation: tiles of queries of one block each, through one FlexAttention call."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.flex import call_flex, run_compiled
from flexmoba.masks import GRAIN, realize, tile_mask
from flexmoba.merge import combine, dispatch
from flexmoba.routing import most_rows, route
from flexmoba.score_mod import Modifier, ScoreMod, at_places

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
    modifier: Modifier | None = None,
    keys_of_block: Tensor | None = None,
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
        modifier: What becomes of the scores; None for nothing.
        keys_of_block: As for `routing.route`.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``.
    """
    place = key_position = score_mod = None
    if modifier is not None:
        score_mod, place, key_position, _ = modifier
    out, lse = _attend_in_pieces(
        (q, routed, own, place),
        (k, v, key_position, keys_of_block),
        score_mod=score_mod,
        block_size=block_size,
        scale=scale,
        kernel_options=kernel_options,
        is_causal=is_causal,
    )
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


Tensors = tuple[Tensor | None, ...]


def _attend_in_pieces(of_queries: Tensors, of_keys: Tensors, **static: Any) -> list[Tensor]:
    (q, routed, *_), (k, v, *_) = of_queries, of_keys
    assert q is not None
    assert routed is not None
    assert k is not None
    assert v is not None
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rows = most_rows(
        routed.shape, kv_heads, kv_len, static["block_size"], is_causal=static["is_causal"]
    )
    if rows * max(q.shape[-1], v.shape[-1]) <= _MAX_ELEMENTS or q_len == heads == 1:
        return list(run_compiled(_attend_routed_tiles, *of_queries, *of_keys, **static))

    # In two halves, each of which may be halved again: of the KV heads of all batch elements, of
    # the query heads of one of them, or of the queries of one of those.
    halves: Any
    dim = 1
    if batch * kv_heads > 1:
        of_queries, of_keys = (
            tuple(x if x is None else x.flatten(0, 1)[None] for x in some)
            for some in (of_queries, of_keys)
        )
        kv_middle = (batch * kv_heads + 1) // 2
        middle = kv_middle * (heads // kv_heads)
        halves = zip(_split(of_queries, middle, 1), _split(of_keys, kv_middle, 1), strict=True)
    elif heads > 1:
        halves = ((half, of_keys) for half in _split(of_queries, (heads + 1) // 2, 1))
    else:
        dim, middle = 2, (q_len + 1) // 2
        past = kv_len - q_len + middle if static["is_causal"] else kv_len
        seen = tuple(x if x is None else x[:, :, :past] for x in of_keys)
        halves = zip(_split(of_queries, middle, 2), (seen, of_keys), strict=True)
    results = [_attend_in_pieces(*half, **static) for half in halves]
    return [torch.cat(parts, dim) for parts in zip(*results, strict=True)]


def _split(tensors: Tensors, size: int, dim: int) -> Iterable[Tensors]:
    return zip(*((None, None) if x is None else x.split(size, dim) for x in tensors), strict=True)


def _attend_routed_tiles(
    q: Tensor,
    routed: Tensor,
    own: Tensor | None,
    place: Tensor | None,
    k: Tensor,
    v: Tensor,
    key_position: Tensor | None,
    keys_of_block: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    kv_heads, kv_len = k.shape[1:3]
    block_stride = -(-block_size // GRAIN) * GRAIN
    tiles = route(
        *(routed, own, kv_heads, kv_len, block_size, block_stride),
        is_causal=is_causal,
        # How many blocks a chunk of queries stands in, against keys of a symbolic length, is an
        # expression whose range Inductor of torch 2.11 gets wrong.
        fuse=q.shape[2] == kv_len,
        keys_of_block=keys_of_block,
    )
    mask = tile_mask(
        tiles,
        q.shape,
        kv_heads,
        kv_len,
        block_size,
        block_stride,
        is_causal=is_causal,
        # A score_mod may capture what is to be differentiated.
        backward=torch.is_grad_enabled()
        and (score_mod is not None or any(x.requires_grad for x in (q, k, v))),
        keys_of_block=keys_of_block,
    )
    rows = dispatch(q.reshape(-1, q.shape[-1]), tiles.query_of_row, tiles.row_of_pair)
    keys, values = (_blocks_in_a_row(x, block_size, block_stride) for x in (k, v))
    if score_mod is not None and place is not None and key_position is not None:
        of_rows = place.reshape(-1, 3)[tiles.query_of_row.clamp(min=0)]
        of_keys = _blocks_in_a_row(key_position[..., None], block_size, block_stride)
        places = (x[None, None] for x in of_rows.unbind(-1))
        score_mod = at_places(score_mod, *(realize(x) for x in (*places, of_keys[..., 0])))
    rows = rows.view(1, 1, -1, q.shape[-1])
    out_rows, lse_rows = call_flex(
        rows, keys, values, mask, scale, kernel_options, score_mod, divisible=True
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
