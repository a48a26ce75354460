"""One FlexAttention call over a BlockMask: of a selection, full attention, windows or tiles."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.backends.flex.block_masks import full_mask, materialize, selection_mask, window_mask
from flexmoba.backends.flex.compiled import call_flex, run_compiled
from flexmoba.backends.flex.tile_gate_mask import stretch_of, tile_gate_mask
from flexmoba.backends.options import AttentionOptions
from flexmoba.backends.score_mod import ScoreMod, ScoreModifier, at_positions
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
    """Attention over a selection, as `block_attention` defines it."""
    routed, block_size, own, keys_of_block, _ = selection
    if options.is_causal:
        here = own_block(q.shape[2], k.shape[2], block_size, q.device)
        here = here.expand(q.shape[:3]) if own is None else torch.where(own, here, -1)
        routed = torch.cat([here[..., None], routed], dim=-1)
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
    """Full attention."""
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
    """Causal attention from a first key of each query on; the arguments of `window_mask`."""
    return _run(
        _attend_within_windows,
        *(q, k, v, first_key, modifier),
        longest=longest,
        scale=options.scale,
        kernel_options=options.kernel_options,
    )


def tile_gate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: AttentionOptions,
    modifier: ScoreModifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of tiles of 128 queries, each to its own block and its selected blocks.

    The selection has a row for each tile, and a block size as `tile_gate_mask` takes it; CUDA only.
    """
    missing = -q.shape[2] % TILE
    if missing:  # no block of the mask may be full for a short last tile
        q = F.pad(q, (0, 0, 0, missing))
        if modifier is not None:
            # Rows of padding are at position 0: a score_mod may index tables by position.
            place = F.pad(modifier.place, (0, 0, 0, missing))
            modifier = modifier._replace(place=place, moved=True)
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


def _run(
    attend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    modifier: ScoreModifier | None,
    *more: Tensor | None,
    **static: Any,
) -> tuple[Tensor, Tensor]:
    places = score_mod = None
    if modifier is not None:
        score_mod = modifier.score_mod
        if modifier.moved:
            places = modifier.place, modifier.key_position
    tensors = q, k, v, visible, *(places or (None, None)), *more
    return run_compiled(attend, *tensors, score_mod=score_mod, **static)


def _attend_over_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    place: Tensor | None,
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
    score_mod = _at_positions(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_fully(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: None,
    place: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    mask = full_mask(q.shape[2], k.shape[2], q.device, is_causal=is_causal)
    score_mod = _at_positions(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_within_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    place: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    longest: int,
    scale: float,
    kernel_options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    mask = window_mask(first_key, longest)
    score_mod = _at_positions(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_over_tile_gate_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    place: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    divisible: bool,
) -> tuple[Tensor, Tensor]:
    # A score_mod may capture what is to be differentiated.
    backward = torch.is_grad_enabled() and (
        score_mod is not None or any(x.requires_grad for x in (q, k, v))
    )
    mask = tile_gate_mask(chosen, q.shape[2], k.shape[2], block_size, backward=backward)
    score_mod = _at_positions(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod, divisible=divisible)


def _at_positions(
    score_mod: ScoreMod | None,
    q: Tensor,
    k: Tensor,
    place: Tensor | None,
    key_position: Tensor | None,
) -> ScoreMod | None:
    if score_mod is None or place is None or key_position is None:
        return score_mod
    key_position = key_position.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return at_positions(score_mod, *(materialize(x) for x in (*place.unbind(-1), key_position)))
