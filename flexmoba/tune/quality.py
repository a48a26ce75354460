"""Measures the selection of the gate on given queries and keys: captured mass and SNR.

Full attention is computed only for the given queries, a few at a time, so that sequences may be
long.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from flexmoba.blocks import ceil_div
from flexmoba.checks import (
    check_block_size,
    check_gate,
    check_gate_block_size,
    check_queries_and_keys,
    check_topk,
)
from flexmoba.gate import GateOptions, block_means, block_scores, forced_blocks, top_blocks

_SCORES_AT_ONCE = 2**24


class Gate(NamedTuple):
    """The block size and options of a gate, as in `moba_select`."""

    block_size: int
    gate_block_size: int | None = None
    sink_blocks: int = 0
    local_blocks: int = 0


class Quality(NamedTuple):
    """The quality of a gate with one block size on given queries and keys, for several topks.

    All tensors are float32 on CPU, means over the batch and the given queries. A value is NaN if
    no query has enough past blocks for it.

    Attributes:
        mass: ``(topks, Hq)``, captured mass: the share of a query's full attention that falls on
            the keys of its selected blocks, including its own block.
        best_mass: ``(topks, Hq)``, the best possible mass: the captured mass of the best selection
            of as many blocks, the own block and the past blocks with the largest shares. The gate
            loses the difference to `mass`.
        found: ``(topks, Hq)``, the share of the queries with a past block for which the block of
            the strongest past key (the key of highest attention before the own block) is selected.
        snr: ``(Hq,)``, the signal-to-noise ratio of the gate; see `gate_quality`.
    """

    mass: Tensor
    best_mass: Tensor
    found: Tensor
    snr: Tensor


def gate_quality(
    q: Tensor,
    k: Tensor,
    block_size: int | Sequence[int],
    topk: int | Sequence[int],
    *,
    gate_block_size: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> dict[int, Quality]:
    r"""Measures captured mass and the signal-to-noise ratio of the gate in causal attention.

    The selection is that of `moba_select` (arXiv 2502.13189, Sec. 2.2). The signal-to-noise ratio
    is defined in arXiv 2511.11571, Sec. 3: a block with one signal key among noise keys scores
    higher than a block of noise by ``D``, with ``E[D] = dmu_eff / B`` and ``Var[D] = 2 / (d B)``
    for block size ``B`` and head dim ``d``. It follows that
    ``SNR = E[D] / sd[D] = dmu_eff sqrt(d / 2B)``, and that a noise block scores higher with
    probability ``Phi(-SNR)``.

    This function estimates the ratio from the scores. For each query, the signal block is the past
    block with the key of highest attention, and the noise blocks are the other past blocks. With
    ``diff``, the score of the signal block minus the mean score of the noise blocks, and ``var``,
    the variance of the scores of the noise blocks,

        ``SNR = mean(diff) / sqrt(2 mean(var))``

    where the means are over the queries with at least two noise blocks. The result estimates the
    ratio of the paper under the assumptions of the paper: one signal block, and independent and
    identically distributed noise keys. Real keys are neither, real attention is often spread over
    several blocks, and the strongest key raises the score of its block even in pure noise, so that
    the ratio is above 0 there. Use the ratio to compare block sizes. ``found`` shows the effect
    without these assumptions.

    Args:
        q: Queries, ``(B, Hq, Lq, D)``, float16, bfloat16, float32 or float64.
        k: Keys, ``(B, Hkv, Lk, D)``, in the dtype of ``q``. ``Hkv`` divides ``Hq``.
        block_size: Number of keys in a block, or several such numbers.
        topk: Number of blocks that a query attends to, including its own block, or several such
            numbers.
        gate_block_size: Keys in a sub-block, as in `moba_select`, a divisor of each block size. By
            default, each block is its only sub-block. The ratio of the paper is defined for this
            gate.
        sink_blocks: Number of first blocks that are always selected. They count towards ``topk``.
        local_blocks: Number of blocks right before the own block that are always selected. They
            count towards ``topk``.
        positions: The position of each query among the keys, int64 ``(Lq,)``. By default, query
            ``i`` has position ``i + Lk - Lq``. With it, q may be any sample of the queries of a
            sequence.
        scale: Factor on the attention scores, by default ``1 / sqrt(D)``.

    Returns:
        The `Quality` for each block size, with rows in the order of ``topk``.

    Raises:
        TypeError: An argument has the wrong type.
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
    gates = [Gate(size, gate_block_size, sink_blocks, local_blocks) for size in sizes]
    found = gate_qualities(q, k, gates, topks, positions=positions, scale=scale)
    return {gate.block_size: quality for gate, quality in found.items()}


@torch.no_grad()
def gate_qualities(
    q: Tensor,
    k: Tensor,
    gates: Sequence[Gate],
    topks: Sequence[int],
    *,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> dict[Gate, Quality]:
    """Computes `gate_quality` for several gates."""
    for topk in topks:
        check_topk(topk)
    sub_blocks = {}
    for gate in gates:
        size, part, sinks, local = gate
        check_block_size(size)
        sub_blocks[gate] = check_gate_block_size(part, size)
        check_gate("token", sinks, local, 0, size, min(topks, default=None), is_causal=True)
    if positions is None:
        check_queries_and_keys(q, k)
        positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    else:
        _check_positions(q, k, positions)
    if not gates or not topks or q.numel() == 0:
        raise ValueError(
            f"nothing to measure: q is {tuple(q.shape)}, block_size "
            f"{tuple(x.block_size for x in gates)}, topk {tuple(topks)}; pass queries, a block "
            "size and a topk"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    positions = positions.to(q.device)
    group = q.shape[1] // k.shape[1]
    sums = {gate: _Sums(len(topks), q.shape[1]) for gate in gates}
    means = {gate: block_means(k, gate.block_size, sub_blocks=n) for gate, n in sub_blocks.items()}
    queries_at_once = max(1, _SCORES_AT_ONCE // k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for rows in torch.arange(q.shape[2], device=q.device).split(queries_at_once):
                queries, at = q[b, h, rows], positions[rows]
                logits = _logits(queries, k[b, h // group], at, scale)
                for gate in gates:
                    mean_keys = means[gate][b, h // group]
                    sums[gate].add(h, logits, queries, mean_keys, at, gate, topks)
    return {gate: sums[gate].quality() for gate in gates}


def required_snr(n_blocks: int, topk: int) -> float | None:
    """Returns the SNR that makes a gate reliable: ``Phi^-1(1 - topk / n)`` for ``n`` blocks.

    Above this ratio, fewer than ``topk`` noise blocks are expected to score higher than the signal
    block (arXiv 2511.11571, Sec. 3).

    Args:
        n_blocks: Number of blocks.
        topk: Number of selected blocks.

    Returns:
        The ratio, or None if ``topk`` selects all blocks.
    """
    return None if topk >= n_blocks else NormalDist().inv_cdf(1 - topk / n_blocks)


def _check_positions(q: Tensor, k: Tensor, positions: Tensor) -> None:
    """Raises unless ``positions`` holds the index of a key for each query."""
    check_queries_and_keys(q, k)
    if positions.dtype != torch.int64 or positions.shape != q.shape[2:3]:
        raise ValueError(
            f"positions must be int64 of shape ({q.shape[2]},), one for each query, got "
            f"{positions.dtype} of shape {tuple(positions.shape)}; pass the index of each query "
            "among the keys"
        )
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < k.shape[2]:
        raise ValueError(
            f"positions must be from 0 to {k.shape[2] - 1}, the last key, got "
            f"{int(positions.min())} to {int(positions.max())}; pass the index of each query among "
            "the keys"
        )


def _logits(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Returns causally masked attention scores ``(rows, Lk)``, at least float32."""
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(precise) @ k.to(precise).T * scale
    future = torch.arange(k.shape[0], device=q.device) > positions[:, None]
    return logits.masked_fill_(future, -math.inf)


def _selected(scores: Tensor, own: Tensor, width: int, gate: Gate) -> Tensor:
    """Returns the past blocks that the gate selects, ``(rows, width)`` or more; -1 for none.

    Those that are always selected come first, then the others by descending score.
    """
    options = GateOptions("token", gate.sink_blocks, gate.local_blocks)
    first = torch.full_like(own, gate.sink_blocks)
    count = max(0, width - options.forced)
    best = top_blocks(scores, first, own - gate.local_blocks, count).long()
    forced = forced_blocks(own.new_zeros(1, 1), own[None], options)
    return best if forced is None else torch.cat([forced[0, 0].long(), best], dim=-1)


class _Sums:
    """The sums over queries from which the `Quality` for one block size is computed."""

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
        gate: Gate,
        topks: Sequence[int],
    ) -> None:
        """Adds the queries of one head.

        Args:
            head: Index of the query head.
            logits: ``(rows, Lk)``, attention scores of the queries, -inf for hidden keys.
            q: ``(rows, D)``, the queries.
            means: ``(blocks * sub_blocks, D)``, mean keys of sub-blocks.
            positions: ``(rows,)`` int64, positions of the queries.
            gate: Block size, and blocks that are always selected.
            topks: Numbers of selected blocks.
        """
        block_size = gate.block_size
        n_blocks, own = ceil_div(logits.shape[1], block_size), (positions // block_size)[:, None]
        past = torch.arange(n_blocks, device=q.device) < own
        padded = torch.nn.functional.pad(
            logits, (0, n_blocks * block_size - logits.shape[1]), value=-math.inf
        )
        share = padded.softmax(-1).unflatten(-1, (n_blocks, block_size)).sum(-1)
        strongest = padded.unflatten(-1, (n_blocks, block_size)).amax(-1)
        strongest = strongest.masked_fill(~past, -math.inf).argmax(-1, keepdim=True)

        precise = torch.promote_types(q.dtype, torch.float32)
        scores = block_scores(q.to(precise) @ means.to(precise).T, means.shape[0] // n_blocks)
        width = min(max(topks) - 1, n_blocks)
        selected = _selected(scores, own[:, 0], width, gate)
        captured = share.gather(1, selected.clamp(min=0)).masked_fill(selected < 0, 0.0)
        best = share.masked_fill(~past, 0.0).topk(width, dim=-1).values
        hit = (selected == strongest) & (own > 0)
        own_share = share.gather(1, own)[:, 0].sum()
        for i, topk in enumerate(topks):
            self.mass[i, head] += float(own_share + captured[:, : topk - 1].sum())
            self.best_mass[i, head] += float(own_share + best[:, : topk - 1].sum())
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
        deviation = (scores - mean[:, None]).masked_fill(~noise, 0.0)
        self.diff[head] += float((scores.gather(1, signal)[:, 0] - mean).sum())
        self.var[head] += float((deviation.square().sum(-1) / (n - 1)).sum())
        self.with_noise[head] += len(n)

    def quality(self) -> Quality:
        """Returns the means."""
        diff, var = self.diff / self.with_noise, self.var / self.with_noise
        values = (
            self.mass / self.queries,
            self.best_mass / self.queries,
            self.found / self.with_past,
            diff / (2 * var).sqrt(),
        )
        return Quality(*(x.float() for x in values))
