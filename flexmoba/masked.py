"""The masked implementation: one FlexAttention call over a mask of what every query sees."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flexmoba.flex import call_flex, run_compiled
from flexmoba.masks import full_mask, realize, selection_mask
from flexmoba.score_mod import Modifier, ScoreMod, at_places


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
    modifier: Modifier | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a selection; full attention, whatever the block size, if it is None."""
    places = score_mod = None
    if modifier is not None:
        score_mod = modifier.score_mod
        if modifier.moved:
            places = modifier.place, modifier.key_position
    return run_compiled(
        _attend_over_mask,
        *(q, k, v, selection, *(places or (None, None))),
        score_mod=score_mod,
        block_size=block_size,
        scale=scale,
        kernel_options=kernel_options,
        is_causal=is_causal,
    )


def _attend_over_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor | None,
    place: Tensor | None,
    key_position: Tensor | None,
    *,
    score_mod: ScoreMod | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    if selection is None:
        mask = full_mask(q.shape[2], k.shape[2], q.device, is_causal=is_causal)
    else:
        mask = selection_mask(selection, k.shape[2], block_size, is_causal=is_causal)
    if score_mod is not None and place is not None and key_position is not None:
        key_position = key_position.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        score_mod = at_places(score_mod, realize(place), realize(key_position))
    return call_flex(q, k, v, mask, scale, kernel_options, score_mod)
