"""The masked implementation: one FlexAttention call over a mask of what every query sees."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flexmoba.flex import call_flex, run_compiled
from flexmoba.masks import full_mask, selection_mask


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Tensor | None,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any] | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over a selection; full attention, whatever the block size, if it is None."""
    return run_compiled(
        _attend_over_mask,
        *(q, k, v, selection),
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
    *,
    block_size: int,
    scale: float,
    kernel_options: Mapping[str, Any],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    if selection is None:
        mask = full_mask(q.shape[2], k.shape[2], q.device, is_causal=is_causal)
    else:
        mask = selection_mask(selection, k.shape[2], block_size, is_causal=is_causal)
    return call_flex(q, k, v, mask, scale, kernel_options)
