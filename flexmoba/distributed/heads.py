"""The exchange by heads: each rank gets the complete sequence for its share of the heads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexmoba.distributed.attend import Attention
from flexmoba.distributed.ranks import Ranks, all_to_all


def attend_by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Attention | Callable[..., tuple[Tensor, Tensor]],
    ranks: Ranks,
    *,
    with_lse: bool,
    **documents: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes the attention of this rank's queries; see `context_parallel_moba`.

    Args:
        q: This rank's queries, ``(B, Hq, L, D)``.
        k: This rank's keys, ``(B, Hkv, L, D)``.
        v: This rank's values, ``(B, Hkv, L, Dv)``.
        attention: The attention, or a function of the same arguments.
        ranks: The ranks, whose number divides ``Hkv``, or divides ``Hq`` and is a multiple of
            ``Hkv``.
        with_lse: Whether to return the log-sum-exp.
        documents: ``cu_seqlens`` and ``max_seqlen`` of the complete sequence.

    Returns:
        The output ``(B, Hq, L, Dv)`` and the log-sum-exp ``(B, Hq, L)`` or None.
    """
    copies = max(1, ranks.size // k.shape[1])
    if copies > 1:  # several ranks have query heads of one KV head
        k, v = (x[:, :, None].expand(-1, -1, copies, -1, -1).flatten(1, 2) for x in (k, v))
    first_head = ranks.rank * (q.shape[1] // ranks.size)
    q, k, v = _Exchange.apply(ranks, True, q, k, v)  # type: ignore[no-untyped-call]
    out, lse = attention(q, k, v, first_head=first_head, **documents)
    results = (out, lse[..., None]) if with_lse else (out,)
    results = _Exchange.apply(ranks, False, *results)  # type: ignore[no-untyped-call]
    return results[0], results[1][..., 0] if with_lse else None


class _Exchange(torch.autograd.Function):
    """Splits tensors by heads instead of by tokens, or back."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, to_heads: bool, *tensors: Tensor) -> Any:
        ctx.ranks, ctx.to_heads = ranks, to_heads
        return _split(ranks, to_heads, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # A graph of torch.compile has no second derivatives.
        split = _split if torch.compiler.is_compiling() else _Exchange.apply
        return None, None, *split(ctx.ranks, not ctx.to_heads, *grads)


def _split(ranks: Ranks, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    return split_by_heads(ranks, *tensors) if to_heads else split_by_tokens(ranks, *tensors)


def split_by_heads(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Exchanges tensors ``(B, H, L, D)`` of all heads for ``(B, H / ranks, total, D)``."""
    pending, shapes = [], []
    for x in tensors:
        batch, heads, length, dim = x.shape
        share = batch * (heads // ranks.size) * dim  # elements of a token that a rank gets
        parts = x.unflatten(1, (ranks.size, -1)).transpose(0, 1).contiguous().flatten()
        sizes = [share * length] * ranks.size
        received = [share * n for n in ranks.lengths]
        pending.append(all_to_all(parts, sizes, received, ranks.group))
        shapes.append((batch, heads // ranks.size, dim))
    return tuple(
        torch.cat(
            [
                part.view(batch, heads, length, dim)
                for part, length in zip(
                    each.wait().split([batch * heads * dim * n for n in ranks.lengths]),
                    ranks.lengths,
                    strict=True,
                )
            ],
            dim=2,
        )
        for each, (batch, heads, dim) in zip(pending, shapes, strict=True)
    )


def split_by_tokens(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Exchanges tensors ``(B, H / ranks, total, D)`` for ``(B, H, L, D)`` of this rank's tokens."""
    pending, shapes = [], []
    for x in tensors:
        batch, heads, _, dim = x.shape
        share = batch * heads * dim
        parts = torch.cat([part.flatten() for part in x.split(ranks.lengths, dim=2)])
        sizes = [share * n for n in ranks.lengths]
        received = [share * ranks.length] * ranks.size
        pending.append(all_to_all(parts, sizes, received, ranks.group))
        shapes.append((ranks.size, batch, heads, ranks.length, dim))
    return tuple(
        each.wait().view(shape).transpose(0, 1).flatten(1, 2)
        for each, shape in zip(pending, shapes, strict=True)
    )
