"""Floating point operations of flexmoba's operators, for `torch.utils.flop_counter`.

A product of ``(m, n)`` and ``(n, k)`` counts as ``2 m n k`` operations, as everywhere in PyTorch.
The forward pass of attention counts two products, the backward pass five, over the query-key pairs
of Mixture of Block Attention: the own block up to the query, and as many full past blocks as the
selection has columns, if that many exist. The formulas read no values: a row of a selection with
fewer blocks counts as if every column held a block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import flexmoba.cache  # noqa: F401 (registers the operators of this and lower rooms)

Shape = Sequence[int]


def pairs(q_len: int, kv_len: int, block_size: int, routed: int, *, is_causal: bool) -> int:
    """Counts the query-key pairs of one head, with ``routed`` blocks beside the own block."""
    n_blocks = -(-kv_len // block_size)
    if not is_causal:
        return q_len * min(routed * block_size, kv_len)
    total = 0
    for block in range((kv_len - q_len) // block_size, n_blocks):
        first = max(block * block_size, kv_len - q_len)
        end = min((block + 1) * block_size, kv_len)
        # Queries see 1, 2, ... keys of their own block: an arithmetic series.
        own = sum(x - block * block_size for x in (first + 1, end)) * (end - first) // 2
        total += own + (end - first) * min(routed, block) * block_size
    return total


def _attention(q: Shape, v: Shape, n_pairs: int, *, backward: bool) -> int:
    batch, heads, _, dim = q
    products = 3 * dim + 2 * v[3] if backward else dim + v[3]
    return 2 * batch * heads * n_pairs * products


def register_flop_formulas(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a formula for an operator of attention and for its backward pass."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        def backward(
            grad_out: Shape,
            grad_lse: Shape | None,
            out: Shape,
            lse: Shape,
            *inputs: Any,
            out_shape: Any = None,
        ) -> int:
            return formula(*inputs, backward=True)

        operators = torch.ops.flexmoba
        register_flop_formula(getattr(operators, f"attend_{name}"))(formula)
        register_flop_formula(getattr(operators, f"attend_{name}_backward"))(backward)
        return formula

    return register


@register_flop_formulas("portable")
def _portable(
    q: Shape, k: Shape, v: Shape, *tables: Any, out_shape: Any = None, backward: bool = False
) -> int:
    (_, _, row_of_pair, _, _), (_, n_own_tiles, block_size, _) = tables[:5], tables[5:]
    count = pairs(q[2], k[2], block_size, row_of_pair[1] - 1, is_causal=n_own_tiles > 0)
    return _attention(q, v, count, backward=backward)


@register_flop_formulas("fused")
def _fused(
    q: Shape,
    k: Shape,
    v: Shape,
    routed: Shape,
    own: Shape | None,
    block_size: int,
    scale: float,
    is_causal: bool,
    out_shape: Any = None,
    *,
    backward: bool = False,
) -> int:
    count = pairs(q[2], k[2], block_size, routed[3], is_causal=is_causal)
    return _attention(q, v, count, backward=backward)


@register_flop_formulas("dense")
def _dense(
    q: Shape,
    k: Shape,
    v: Shape,
    scale: float,
    is_causal: bool,
    out_shape: Any = None,
    *,
    backward: bool = False,
) -> int:
    count = pairs(q[2], k[2], k[2], 1 - is_causal, is_causal=is_causal)
    return _attention(q, v, count, backward=backward)


@register_flop_formulas("grouped")
def _grouped(
    q: Shape,
    k: Shape,
    v: Shape,
    selected: Shape,
    block_size: int,
    scale: float,
    is_causal: bool,
    out_shape: Any = None,
    *,
    backward: bool = False,
) -> int:
    """Counts as if, in causal attention, the first column listed the own block."""
    routed = selected[3] - int(is_causal)
    count = pairs(q[2], k[2], block_size, routed, is_causal=is_causal)
    return _attention(q, v, count, backward=backward)


@register_flop_formula(torch.ops.flexmoba.select)
def _select(
    rows: Shape,
    k: Shape,
    first_block: Shape | None,
    end_block: Shape | None,
    keys_of_block: Shape | None,
    offset: int,
    block_size: int,
    *options: Any,
    out_shape: Any = None,
) -> int:
    """Counts the scores of all mean keys; half of them if causal, the limit for long sequences."""
    batch, heads, n_rows, dim = rows
    *_, sub_blocks, is_causal = options
    scores: int = n_rows * -(-k[2] // block_size) * sub_blocks
    return 2 * batch * heads * dim * (scores // 2 if is_causal else scores)


@register_flop_formula(torch.ops.flexmoba.attend_cached)
def _cached(
    q: Shape,
    k: Shape,
    v: Shape,
    means: Shape,
    positions: Shape,
    tile_queries: Shape | None,
    block_size: int,
    topk: int,
    *options: Any,
    out_shape: Any = None,
) -> int:
    """Counts a full cache, because the lengths of its rows are values."""
    batch, heads, n, dim = q
    gate = 2 * batch * heads * n * dim * means[2]
    return gate + _attention(q, v, n * min(topk * block_size, k[2]), backward=False)
