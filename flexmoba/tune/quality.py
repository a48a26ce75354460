"""How good the gate's choice is on given queries and keys: captured attention and its clarity.

Full attention is computed for sampled queries only, in pieces, so that sequences may be long.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.checks import check_block_size, check_queries_and_keys, check_topk
from flexmoba.gate import block_means, top_blocks

_SCORES_AT_ONCE = 2**24


class Quality(NamedTuple):
    """What a gate of one block size does with given queries and keys, for several topk.

    All are float32 on CPU, means over the batch and the sampled queries. A value that no query
    can tell anything about, as there are too few blocks before it, is NaN.

    Attributes:
        mass: ``(topks, Hq)``: the share of a query's full attention that goes to keys of its
            selected blocks, its own included.
        best_mass: ``(topks, Hq)``: the same for the best selection of as many blocks, the own one
            and those of the largest share. What `mass` lacks of it the gate loses.
        found: ``(topks, Hq)``: of queries with a past block, the share whose strongest past key
            (before the own block) stands in a selected block.
        snr: ``(Hq,)``: the gate's signal-to-noise ratio; see `gate_quality`.
    """

    mass: Tensor
    best_mass: Tensor
    found: Tensor
    snr: Tensor


@torch.no_grad()
def gate_quality(
    q: Tensor,
    k: Tensor,
    block_size: int | Sequence[int],
    topk: int | Sequence[int],
    *,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> dict[int, Quality]:
    r"""Measures what selected blocks capture of full causal attention, and how clear the choice is.

    The choice is that of `moba_select` (arXiv 2502.13189, Sec. 2.2). The signal-to-noise ratio
    is that of arXiv 2511.11571, Sec. 3: a block that holds one signal key among noise keys scores
    by ``D`` higher than a block of noise, with ``E[D] = dmu_eff / B`` and ``Var[D] = 2 / (d B)``
    for block size ``B`` and head dim ``d``, so that ``SNR = E[D] / sd[D] = dmu_eff sqrt(d / 2B)``,
    and a noise block wins with probability ``Phi(-SNR)``.

    Here the same ratio is estimated from the scores themselves. For each query the signal block
    is the block before the own one that holds its key of highest attention, and the noise blocks
    are the others before the own one. With ``diff`` the score of the signal block less the mean
    score of the noise blocks, and ``var`` the variance of the scores of the noise blocks,

        ``SNR = mean(diff) / sqrt(2 mean(var))``

    where the means go over the queries with two noise blocks at least. The ratio estimates the
    paper's where its model holds: one signal block, noise keys independent and alike. Real keys
    are neither, real attention is spread over several blocks, and on pure noise the strongest key
    still lifts its block a little, so the ratio is above 0 there. ``found`` needs no model: read
    the ratio to compare block sizes, and ``found`` for what comes of it.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64.
        k: Keys, ``(B, Hkv, Lk, D)``, of the same dtype, ``Hkv`` dividing ``Hq``.
        block_size: Keys in a block, or several sizes.
        topk: Blocks that a query attends to, its own included, or several numbers.
        positions: Where the queries stand among the keys, int64 ``(Lq,)``; by default query ``i``
            stands at ``i + Lk - Lq``. With it, q may hold any sample of a sequence's queries.
        scale: Factor on the attention scores, ``1 / sqrt(D)`` by default.

    Returns:
        By block size, its `Quality`; rows of it are in the order of ``topk``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Shapes, dtypes, devices, sizes or positions do not fit.

    Examples:
        >>> import torch
        >>> from flexmoba.tune import gate_quality
        >>> q, k = torch.randn(2, 1, 2, 512, 16)
        >>> quality = gate_quality(q, k, block_size=64, topk=(1, 3, 8))[64]
        >>> quality.mass.shape
        torch.Size([3, 2])
        >>> bool((quality.mass <= quality.best_mass + 1e-6).all())
        True
        >>> quality.mass[2].round(decimals=4).tolist()  # all 8 blocks: full attention
        [1.0, 1.0]
    """
    sizes = (block_size,) if isinstance(block_size, int) else tuple(block_size)
    topks = (topk,) if isinstance(topk, int) else tuple(topk)
    for size in sizes:
        check_block_size(size)
    for number in topks:
        check_topk(number)
    if positions is None:
        check_queries_and_keys(q, k)
        positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    else:
        _check_positions(q, k, positions)
    if not sizes or not topks or q.numel() == 0:
        raise ValueError(
            f"nothing to measure: q is {tuple(q.shape)}, block_size {sizes}, topk {topks}; "
            "give queries, a block size and a topk"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    positions = positions.to(q.device)
    group = q.shape[1] // k.shape[1]
    sums = {size: _Sums(len(topks), q.shape[1]) for size in sizes}
    means = {size: block_means(k, size) for size in sizes}
    piece = max(1, _SCORES_AT_ONCE // k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for rows in torch.arange(q.shape[2], device=q.device).split(piece):
                queries, places = q[b, h, rows], positions[rows]
                logits = _logits(queries, k[b, h // group], places, scale)
                for size in sizes:
                    centres = means[size][b, h // group]
                    sums[size].add(h, logits, queries, centres, places, size, topks)
    return {size: sums[size].quality() for size in sizes}


def required_snr(n_blocks: int, topk: int) -> float | None:
    """The ratio above which a gate is reliable: ``Phi^-1(1 - topk / n)``, arXiv 2511.11571, Sec. 3.

    Above it, of ``n`` blocks fewer than ``topk`` of pure noise are expected to outscore the one
    with the signal. None where all blocks are selected anyway.
    """
    return None if topk >= n_blocks else NormalDist().inv_cdf(1 - topk / n_blocks)


def _check_positions(q: Tensor, k: Tensor, positions: Tensor) -> None:
    check_queries_and_keys(q, k)
    if positions.dtype != torch.int64 or positions.shape != q.shape[2:3]:
        raise ValueError(
            f"positions must be int64 of shape ({q.shape[2]},), one for each query, got "
            f"{positions.dtype} of shape {tuple(positions.shape)}"
        )
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < k.shape[2]:
        raise ValueError(
            f"positions must lie from 0 to {k.shape[2] - 1}, among the keys, got "
            f"{int(positions.min())} to {int(positions.max())}"
        )


def _logits(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Causally masked attention scores ``(rows, Lk)``, in float32 at least."""
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(precise) @ k.to(precise).T * scale
    future = torch.arange(k.shape[0], device=q.device) > positions[:, None]
    return logits.masked_fill_(future, -math.inf)


class _Sums:
    """Sums over queries of one block size, from which the means come."""

    def __init__(self, topks: int, heads: int) -> None:
        self.queries, self.with_past, self.with_noise = torch.zeros(3, heads, dtype=torch.float64)
        self.diff, self.var = torch.zeros(2, heads, dtype=torch.float64)
        shape = (3, topks, heads)
        self.mass, self.best_mass, self.found = torch.zeros(shape, dtype=torch.float64)

    def add(
        self,
        head: int,
        logits: Tensor,
        q: Tensor,
        means: Tensor,
        positions: Tensor,
        block_size: int,
        topks: tuple[int, ...],
    ) -> None:
        """Adds the queries ``q (rows, D)`` of one head, given their logits ``(rows, Lk)``."""
        n_blocks, own = means.shape[0], (positions // block_size)[:, None]
        past = torch.arange(n_blocks, device=q.device) < own
        padded = torch.nn.functional.pad(
            logits, (0, n_blocks * block_size - logits.shape[1]), value=-math.inf
        )
        share = padded.softmax(-1).unflatten(-1, (n_blocks, block_size)).sum(-1)
        strongest = padded.unflatten(-1, (n_blocks, block_size)).amax(-1)
        strongest = strongest.masked_fill(~past, -math.inf).argmax(-1, keepdim=True)

        precise = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(precise) @ means.to(precise).T
        width = min(max(topks) - 1, n_blocks)
        zero = torch.zeros_like(own[:, 0])
        chosen = top_blocks(scores, zero, own[:, 0], width).long()  # by descending score
        captured = share.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0)
        best = share.masked_fill(~past, 0.0).topk(width, dim=-1).values
        hit = (chosen == strongest) & (own > 0)
        of_own = share.gather(1, own)[:, 0].sum()
        for i, topk in enumerate(topks):
            self.mass[i, head] += float(of_own + captured[:, : topk - 1].sum())
            self.best_mass[i, head] += float(of_own + best[:, : topk - 1].sum())
            self.found[i, head] += float(hit[:, : topk - 1].sum())
        self.queries[head] += len(q)
        self.with_past[head] += float((own > 0).sum())
        self._add_scores(head, scores, past, strongest)

    def _add_scores(self, head: int, scores: Tensor, past: Tensor, signal: Tensor) -> None:
        noise = past.scatter(1, signal, value=False)
        n = noise.sum(-1)
        usable = n >= 2
        scores, noise, signal, n = scores[usable], noise[usable], signal[usable], n[usable]
        mean = scores.masked_fill(~noise, 0.0).sum(-1) / n
        off = (scores - mean[:, None]).masked_fill(~noise, 0.0)
        self.diff[head] += float((scores.gather(1, signal)[:, 0] - mean).sum())
        self.var[head] += float((off.square().sum(-1) / (n - 1)).sum())
        self.with_noise[head] += len(n)

    def quality(self) -> Quality:
        """The means."""
        diff, var = self.diff / self.with_noise, self.var / self.with_noise
        values = (
            self.mass / self.queries,
            self.best_mass / self.queries,
            self.found / self.with_past,
            diff / (2 * var).sqrt(),
        )
        return Quality(*(x.float() for x in values))
