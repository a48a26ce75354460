"""One FlexAttention call with a BlockMask: of a selection, full attention, windows or tiles."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.backends.flex.block_masks import full_mask, materialize, selection_mask, window_mask
from flexmoba.backends.flex.compiled import call_flex, run_compiled
from flexmoba.backends.flex.range_mask import range_mask
from flexmoba.backends.flex.tile_gate_mask import stretch_of, tile_gate_mask
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.score_mod import ScoreMod, ScoreModifier, remap_indices
from flexmoba.blocks import TILE, own_block
from flexmoba.selection import BlockSelection


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `block_attention` by one FlexAttention call with the mask of the selection."""
    routed, block_size, own, keys_of_block, _ = selection
    if options.is_causal:
        own_index = own_block(q.shape[2], k.shape[2], block_size, q.device)
        own_index = (
            own_index.expand(q.shape[:3]) if own is None else torch.where(own, own_index, -1)
        )
        routed = torch.cat([own_index[..., None], routed], dim=-1)
    return _run(
        _attend_over_mask,
        *(q, k, v, routed, modifier, keys_of_block),
        block_size=block_size,
        scale=options.scale,
        kernel_options=options.kernel_options,
        is_causal=options.is_causal,
    )


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes full attention; the arguments and results are those of `block_attention`."""
    return _run(
        _attend_fully,
        *(q, k, v, None, modifier),
        scale=options.scale,
        kernel_options=options.kernel_options,
        is_causal=options.is_causal,
    )


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    longest: int,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes causal attention within windows; see `attend.window_attention`."""
    return _run(
        _attend_within_windows,
        *(q, k, v, first_key[:, None], modifier),  # lengths vary in the third dimension
        longest=longest,
        scale=options.scale,
        kernel_options=options.kernel_options,
        divisible=_has_full_tiles(q),
    )


def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor | None,
    end_key: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Computes attention of each query to a range of keys.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``.
        k: Keys, ``(B, Hkv, Lk, D)``.
        v: Values, ``(B, Hkv, Lk, Dv)``.
        first_key: ``(B, Lq)`` int32, the first key of each query, or None for key 0; it never
            decreases along a row.
        end_key: ``(Lq,)`` int32, the end of the keys of each query; it never decreases.
        options: The options; the backend is not ``"portable"``.

    Returns:
        The output ``(B, Hq, Lq, Dv)`` and the log-sum-exp ``(B, Hq, Lq)``; zeros and -inf for a
        query without keys.
    """
    return _run(
        _attend_within_ranges,
        *(q, k, v, end_key[None, None], None),  # lengths vary in the third dimension
        None if first_key is None else first_key[:, None],
        scale=options.scale,
        kernel_options=options.kernel_options,
        divisible=_has_full_tiles(q),  # keys are padded to full stretches
    )


def tile_gate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes causal attention of tiles of 128 queries to their own and selected blocks.

    Runs only on CUDA. The arguments and results are those of `block_attention`, except that the
    selection has one row for each tile, and that its block size is a multiple of 128.
    """
    missing = -q.shape[2] % TILE
    if missing:  # a full block of the mask needs full tiles of queries
        q = F.pad(q, (0, 0, 0, missing))
        if modifier is not None:
            # Rows of padding get position 0, because a score_mod may index tables by position.
            query_indices = F.pad(modifier.query_indices, (0, 0, 0, missing))
            modifier = modifier._replace(query_indices=query_indices, is_remapped=True)
    out, lse = _run(
        _attend_over_tile_gate_mask,
        *(q, k, v, selection.routed, modifier),
        block_size=selection.block_size,
        scale=options.scale,
        kernel_options=options.kernel_options,
        divisible=bool(k.shape[2] % stretch_of(selection.block_size) == 0),
    )
    length = q.shape[2] - missing
    return out[:, :, :length], lse[:, :, :length]


def _has_full_tiles(q: Tensor) -> bool | None:
    """Returns True if all tiles of queries are full, so that kernels need not check bounds."""
    return bool(q.shape[2] % TILE == 0) or None


def _run(
    attend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_table: Tensor | None,
    modifier: ScoreModifier | None,
    *more: Tensor | None,
    **static: Any,
) -> tuple[Tensor, Tensor]:
    """Runs ``attend`` compiled; its mask is computed from ``mask_table``."""
    indices = score_mod = None
    if modifier is not None:
        score_mod = modifier.score_mod
        if modifier.is_remapped:
            indices = modifier.query_indices, modifier.key_position
    tensors = q, k, v, mask_table, *(indices or (None, None)), *more
    return run_compiled(attend, *tensors, score_mod=score_mod, **static)


def _attend_over_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    query_indices: Tensor | None,
    key_position: Tensor | None,
    keys_of_block: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    mask = selection_mask(
        selection, k.shape[2], block_size, is_causal=is_causal, keys_of_block=keys_of_block
    )
    score_mod = _remap_indices(score_mod, q, k, query_indices, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_fully(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_table: None,
    query_indices: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    mask = full_mask(q.shape[2], k.shape[2], q.device, is_causal=is_causal)
    score_mod = _remap_indices(score_mod, q, k, query_indices, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_within_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    query_indices: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    longest: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    divisible: bool | None,
) -> tuple[Tensor, Tensor]:
    mask = window_mask(first_key[:, 0], longest)
    score_mod = _remap_indices(score_mod, q, k, query_indices, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod, divisible=divisible)


def _attend_within_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end_key: Tensor,
    query_indices: None,
    key_position: None,
    first_key: Tensor | None,
    *,
    score_mod: None,
    scale: float,
    kernel_options: Mapping[str, Any],
    divisible: bool | None,
) -> tuple[Tensor, Tensor]:
    # One program of the backward pass computes the gradients of a stretch of keys from all heads
    # that share it. With few keys for many queries, these would be few programs with much work.
    group = q.shape[1] // k.shape[1]
    k, v = (
        F.pad(x, (0, 0, 0, -x.shape[2] % TILE))[:, :, None]
        .expand(-1, -1, group, -1, -1)
        .flatten(1, 2)
        .contiguous()  # one KV head would be a view without a stride over heads
        for x in (k, v)
    )
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    first_key = None if first_key is None else first_key[:, 0]
    mask = range_mask(first_key, end_key[0, 0], k.shape[2], backward=backward)
    # From key 0 on, with full tiles, every list of the mask holds consecutive tiles.
    is_contiguous = first_key is None and bool(divisible)
    options = {"BLOCKS_ARE_CONTIGUOUS": is_contiguous} | dict(kernel_options or {})
    out, lse = call_flex(q, k, v, mask, scale, options, divisible=divisible)
    sees_none = end_key[0, 0] <= (0 if first_key is None else first_key[:, None])
    return out, lse.masked_fill(sees_none, float("-inf"))  # without a gradient


def _attend_over_tile_gate_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    query_indices: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    divisible: bool,
) -> tuple[Tensor, Tensor]:
    # A score_mod may capture tensors that require gradients.
    backward = torch.is_grad_enabled() and (
        score_mod is not None or any(x.requires_grad for x in (q, k, v))
    )
    mask = tile_gate_mask(selected, q.shape[2], k.shape[2], block_size, backward=backward)
    score_mod = _remap_indices(score_mod, q, k, query_indices, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod, divisible=divisible)


def _remap_indices(
    score_mod: ScoreMod | None,
    q: Tensor,
    k: Tensor,
    query_indices: Tensor | None,
    key_position: Tensor | None,
) -> ScoreMod | None:
    if score_mod is None or query_indices is None or key_position is None:
        return score_mod
    key_position = key_position.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    indices = *query_indices.unbind(-1), key_position
    return remap_indices(score_mod, *(materialize(x) for x in indices))
