"""Floating point operations of NSA's operators, for `torch.utils.flop_counter`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import flexmoba.nsa.decode
import flexmoba.nsa.select  # noqa: F401 (registers the operators)

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


@register_flop_formula(torch.ops.flexmoba.attend_nsa_step)
def _step(
    q: Shape,
    gates: Shape,
    positions: Shape,
    k: Shape,
    v: Shape,
    k_cmp: Shape,
    v_cmp: Shape,
    k_win: Shape,
    v_win: Shape,
    cmp_block: int,
    cmp_stride: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    window: int,
    *options: Any,
    out_shape: Any = None,
) -> int:
    """Counts a full cache, because the lengths of its rows are values."""
    batch, heads, n, dim = q
    capacity = k[2] - block_size
    keys = k_cmp[2] - 1 + min(topk * block_size, capacity) + min(window, capacity)
    return 2 * batch * heads * n * keys * (dim + v[3])
