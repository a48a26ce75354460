"""Attention of new queries to a cache: a step of at most 16 queries, or a longer chunk."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.backends import AttentionOptions, ScoreMod, attend_selected, resolve
from flexmoba.blocks import TILE, ceil_div, own_block
from flexmoba.cache.decode import MAX_STEP_QUERIES, attend_step
from flexmoba.cache.options import CachedCall
from flexmoba.gate import GateOptions, GateSizes, expand_rows, gate_rows, select_by_means
from flexmoba.runtime import has_values, is_plain_call, without_autocast
from flexmoba.sequence import Layout


class CachedTensors(NamedTuple):
    """The tensors of a cache.

    Attributes:
        k: Keys, ``(B, Hkv, N * block_size, D)``.
        v: Values, ``(B, Hkv, N * block_size, Dv)``.
        means: Mean keys of the full sub-blocks, ``(B, Hkv, N * sub_blocks, D)``.
        tile_queries: The first query of every tile, ``(B, Hq, tiles, D)``; None unless
            ``gate="tile"``.
    """

    k: Tensor
    v: Tensor
    means: Tensor
    tile_queries: Tensor | None


def cached_attention(
    q: Tensor,
    positions: Tensor,
    cache: CachedTensors,
    call: CachedCall,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Computes `MobaCache.attend` for validated arguments.

    Args:
        q: ``(B, Hq, n, D)``.
        positions: Position of each query, ``(B, n)`` int32; -1 for padding.
        cache: Tensors of the cache.
        call: Options.
        score_mod: A function that modifies every score, or None.

    Returns:
        The output ``(B, Hq, n, Dv)`` in the dtype of ``q``, and the log-sum-exp ``(B, Hq, n)``,
        float32 or float64.

    Raises:
        NotImplementedError: A long chunk with ``score_mod`` is traced.
    """
    if score_mod is None:
        if not torch.is_grad_enabled() and is_plain_call(q, cache.k):
            return _attend_step_or_chunk(q, positions, cache, call)
        tensors = q, cache.k, cache.v, cache.means, positions, cache.tile_queries
        out, lse = _attend(*tensors, call.block_size, call.topk, call.scale, *call.gate)
        return out, lse
    n = q.shape[2]
    if n > MAX_STEP_QUERIES and not has_values(positions):
        raise NotImplementedError(
            f"a chunk of {n} tokens with score_mod reads lengths back to the host, which "
            f"torch.compile and fake tensors do not support; trace steps of at most "
            f"{MAX_STEP_QUERIES} tokens"
        )
    return _attend_step_or_chunk(q, positions, cache, call, score_mod)


# An operator, so that compilers do not trace it: the calls for a long chunk depend on the values of
# `positions`. The arguments are flat because the schema of an operator has no tuples.
@torch.library.custom_op("flexmoba::attend_cached", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    positions: Tensor,
    tile_queries: Tensor | None,
    block_size: int,
    topk: int,
    scale: float,
    per: str,
    sink_blocks: int,
    local_blocks: int,
    sub_blocks: int,
) -> tuple[Tensor, Tensor]:
    gate = GateOptions(per, sink_blocks, local_blocks, sub_blocks)
    call = CachedCall(topk, scale, gate, block_size)
    return _attend_step_or_chunk(q, positions, CachedTensors(k, v, means, tile_queries), call)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@without_autocast
def _attend_step_or_chunk(
    q: Tensor,
    positions: Tensor,
    cache: CachedTensors,
    call: CachedCall,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    if q.shape[2] > MAX_STEP_QUERIES:
        return _attend_chunk(q, positions, cache, call, score_mod)
    k, v, means, tile_queries = cache
    if tile_queries is None:
        rows = gate_rows(q, k.shape[1], call.gate)
    else:
        tile = positions.clamp(0, k.shape[2] - 1).long() // TILE
        rows = tile_queries.gather(2, tile[:, None, :, None].expand_as(q))
    return attend_step(q, k, v, means, positions, rows, call, score_mod)


def _attend_chunk(
    q: Tensor,
    positions: Tensor,
    cache: CachedTensors,
    call: CachedCall,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Attends like a call without a cache, which sorts queries by block, one batch row at a time.

    If all rows have the same positions and no padding, one call attends for all rows.
    """
    out = q.new_zeros(*q.shape[:3], cache.v.shape[3])
    lse = torch.full_like(
        out[..., 0], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32)
    )
    positions_of_row = positions.tolist()
    first_row = positions_of_row[0]
    if all(row == first_row for row in positions_of_row) and -1 not in first_row:
        return attend_rows(q, slice(None), max(first_row) + 1, cache, call, score_mod)
    for i, row_positions in enumerate(positions_of_row):
        real = positions[i] >= 0
        queries = q[i : i + 1, :, real]
        if queries.numel() == 0:
            continue
        row = slice(i, i + 1)
        row_out, row_lse = attend_rows(
            queries, row, max(row_positions) + 1, cache, call, _score_mod_of_row(score_mod, i)
        )
        out[row, :, real], lse[row, :, real] = row_out, row_lse
    return out, lse


def attend_rows(
    q: Tensor,
    row: slice,
    kv_len: int,
    cache: CachedTensors,
    call: CachedCall,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Attends from the last queries of batch rows to the first ``kv_len`` keys of these rows."""
    block_size, gate = call.block_size, call.gate
    k, v, means, tile_queries = cache
    if kv_len > k.shape[2]:
        raise ValueError(
            f"the cache has room for {k.shape[2] - block_size} tokens, too few for the positions "
            "of these queries; make it with a larger max_len"
        )
    heads, q_len = q.shape[1:3]
    first = kv_len - q_len
    first_in_tile = first % gate.stride
    if tile_queries is None:
        rows = gate_rows(q, k.shape[1], gate)
    else:
        rows = tile_queries[row, :, first // TILE : ceil_div(kv_len, TILE)]
    sizes = GateSizes(block_size, call.topk - 1, first - first_in_tile, is_causal=True)
    n_means = ceil_div(kv_len, block_size) * gate.sub_blocks
    past = select_by_means(rows, means[row, :, :n_means], sizes, gate)
    past = expand_rows(past, heads, q_len, gate, first_query=first_in_tile)
    own = own_block(q_len, kv_len, block_size, q.device)[:, None]
    selected = torch.cat([own.expand(*past.shape[:3], 1), past], -1)
    k, v = k[row, :, :kv_len], v[row, :, :kv_len]
    options = AttentionOptions(resolve("auto", q, k, v, None, score_mod), call.scale)
    return attend_selected(q, k, v, selected, Layout(block_size), options, score_mod)


@functools.lru_cache(maxsize=256)  # compilers compile every new function, but not a cached one
def _score_mod_of_row(score_mod: ScoreMod | None, row: int) -> ScoreMod | None:
    """Returns ``score_mod`` for a call that has only row ``row`` of the batch."""
    if score_mod is None:
        return None
    return lambda score, b, h, query, key: score_mod(score, b + row, h, query, key)
