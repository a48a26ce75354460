"""Floating point operations of `nsa_select`, for `torch.utils.flop_counter`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import flexmoba.nsa.select  # noqa: F401 (registers the operator)

Shape = Sequence[int]


def seen_pairs(q_len: int, kv_len: int, cmp_block: int, cmp_stride: int) -> int:
    """Counts the pairs of a query and a compressed block that ends at or before it."""
    ends = range(cmp_block - 1, kv_len, cmp_stride)
    return sum(kv_len - max(end, kv_len - q_len) for end in ends)


@register_flop_formula(torch.ops.flexmoba.nsa_select)
def _select(
    q: Shape,
    k_cmp: Shape,
    first_block: Shape | None,
    lse: Shape | None,
    kv_len: int,
    cmp_block: int,
    cmp_stride: int,
    *options: Any,
    out_shape: Any = None,
) -> int:
    """Counts the scores of the compressed blocks that a query sees, once.

    The kernels compute them twice if they do not get the log-sum-exp.
    """
    batch, heads, q_len, dim = q
    return 2 * batch * heads * dim * seen_pairs(q_len, kv_len, cmp_block, cmp_stride)
