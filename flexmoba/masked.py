"""The masked implementation: one FlexAttention call over a mask of what every query sees."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.flex import call_flex, run_compiled
from flexmoba.masks import full_mask, realize, selection_mask, window_mask
from flexmoba.routing import TILE
from flexmoba.score_mod import Modifier, ScoreMod, at_places
from flexmoba.shared_mask import shared_mask, stretch_of


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
    modifier: Modifier | None = None,
    keys_of_block: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a selection; ``keys_of_block`` as for `routing.route`."""
    return _run(
        _attend_over_mask,
        *(q, k, v, selection, modifier, keys_of_block),
        block_size=block_size,
        scale=scale,
        kernel_options=kernel_options,
        is_causal=is_causal,
    )


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention."""
    return _run(
        _attend_densely,
        *(q, k, v, None, modifier),
        scale=scale,
        kernel_options=kernel_options,
        is_causal=is_causal,
    )


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    longest: int,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention from a first key of each query on; the arguments of `masks.window_mask`."""
    return _run(
        _attend_within_windows,
        *(q, k, v, first_key, modifier),
        longest=longest,
        scale=scale,
        kernel_options=kernel_options,
    )


def attend_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of tiles of 128 queries, each with its own block and those that it chose.

    ``chosen`` and ``block_size`` are those of `shared_mask.shared_mask`; CUDA only.
    """
    missing = -q.shape[2] % TILE
    if missing:  # a short last tile could not be full of anything
        q = F.pad(q, (0, 0, 0, missing))
        if modifier is not None:
            # Rows that are none stand at 0: a score_mod may look its places up.
            place = F.pad(modifier.place, (0, 0, 0, missing))
            modifier = modifier._replace(place=place, moved=True)
    out, lse = _run(
        _attend_over_shared_mask,
        *(q, k, v, chosen, modifier),
        block_size=block_size,
        scale=scale,
        kernel_options=kernel_options,
        divisible=bool(k.shape[2] % stretch_of(block_size) == 0),
    )
    length = q.shape[2] - missing
    return out[:, :, :length], lse[:, :, :length]


def _run(
    attend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    modifier: Modifier | None,
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
    score_mod = _placed(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_densely(
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
    score_mod = _placed(score_mod, q, k, place, key_position)
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
    score_mod = _placed(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)


def _attend_over_shared_mask(
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
    mask = shared_mask(chosen, q.shape[2], k.shape[2], block_size, backward=backward)
    score_mod = _placed(score_mod, q, k, place, key_position)
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod, divisible=divisible)


def _placed(
    score_mod: ScoreMod | None,
    q: Tensor,
    k: Tensor,
    place: Tensor | None,
    key_position: Tensor | None,
) -> ScoreMod | None:
    if score_mod is None or place is None or key_position is None:
        return score_mod
    key_position = key_position.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return at_places(score_mod, *(realize(x) for x in (*place.unbind(-1), key_position)))
