"""Allocation of the tensors of a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor


def storage(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Returns zeros that can be written inside and outside ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)
