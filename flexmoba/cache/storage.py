"""Tensors that a cache writes to."""

from collections.abc import Sequence

import torch
from torch import Tensor


def storage(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros that may be written to in and out of ``torch.inference_mode``."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)
