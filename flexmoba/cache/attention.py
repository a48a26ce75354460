"""Attention of new queries to a cache: a step of few queries, or a chunk of many."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoba.backends import AttentionOptions, ScoreMod, attend_selected, resolve
from flexmoba.blocks import TILE, ceil_div, own_block
from flexmoba.cache.decode import MAX_STEP_QUERIES, attend_step
from flexmoba.cache.options import CachedCall
from flexmoba.gate import GateOptions, GateSizes, expand_rows, gate_rows, select_by_means
from flexmoba.runtime import has_values, without_autocast
from flexmoba.sequence import Layout


class CachedTensors(NamedTuple):
    """The tensors of a cache.

    Attributes:
        k: ``(B, Hkv, N * block_size, D)``.
        v: ``(B, Hkv, N * block_size, Dv)``.
        means: ``(B, Hkv, N, D)``, mean keys of the full blocks.
        tile_queries: ``(B, Hq, tiles, D)``, the first query of every tile; None unless
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
    """`MobaCache.attend` of checked arguments."""
    if score_mod is None:
        tensors = q, cache.k, cache.v, cache.means, positions, cache.tile_queries
        out, lse = _attend(*tensors, call.block_size, call.topk, call.scale, *call.gate)
        return out, lse
    n = q.shape[2]
    if n > MAX_STEP_QUERIES and not has_values(positions):
        raise NotImplementedError(
            f"a chunk of {n} tokens with score_mod reads lengths back to the host, which "
            f"torch.compile and fake tensors do not take; trace steps of at most "
            f"{MAX_STEP_QUERIES} tokens"
        )
    return _attend_step_or_chunk(q, positions, cache, call, score_mod)


# Opaque to compilers: what it launches depends on lengths, where there are many queries. The
# arguments are flat because the schema of an operator has no tuples.
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
) -> tuple[Tensor, Tensor]:
    call = CachedCall(topk, scale, GateOptions(per, sink_blocks, local_blocks), block_size)
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
    """Many queries are sorted by block, like any other call, one row of the batch at a time.

    If all rows have the same positions, they are one call.
    """
    out = q.new_zeros(*q.shape[:3], cache.v.shape[3])
    lse = torch.full_like(
        out[..., 0], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32)
    )
    here = positions.tolist()
    if all(row == here[0] for row in here) and -1 not in here[0]:
        return _attend_rows(q, slice(None), max(here[0]) + 1, cache, call, score_mod)
    for i, places in enumerate(here):
        real = positions[i] >= 0
        queries = q[i : i + 1, :, real]
        if queries.numel() == 0:
            continue
        row = slice(i, i + 1)
        part, part_lse = _attend_rows(
            queries, row, max(places) + 1, cache, call, _of_row(score_mod, i)
        )
        out[row, :, real], lse[row, :, real] = part, part_lse
    return out, lse


def _attend_rows(
    q: Tensor,
    row: slice,
    kv_len: int,
    cache: CachedTensors,
    call: CachedCall,
    score_mod: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries of some rows of the batch to their ``kv_len`` keys."""
    block_size, gate = call.block_size, call.gate
    k, v, means, tile_queries = cache
    if kv_len > k.shape[2]:
        raise ValueError(
            f"the cache has room for {k.shape[2] - block_size} tokens, too few for these; "
            "make it with a larger max_len"
        )
    heads, q_len = q.shape[1:3]
    first = kv_len - q_len
    first_in_tile = first % gate.stride
    if tile_queries is None:
        rows = gate_rows(q, k.shape[1], gate)
    else:
        rows = tile_queries[row, :, first // TILE : ceil_div(kv_len, TILE)]
    sizes = GateSizes(block_size, call.topk - 1, first - first_in_tile, is_causal=True)
    past = select_by_means(rows, means[row, :, : ceil_div(kv_len, block_size)], sizes, gate)
    past = expand_rows(past, heads, q_len, gate, first_query=first_in_tile)
    own = own_block(q_len, kv_len, block_size, q.device)[:, None]
    selected = torch.cat([own.expand(*past.shape[:3], 1), past], -1)
    k, v = k[row, :, :kv_len], v[row, :, :kv_len]
    options = AttentionOptions(resolve("auto", q, k, v, None, score_mod), call.scale)
    return attend_selected(q, k, v, selected, Layout(block_size), options, score_mod)


@functools.lru_cache(maxsize=256)  # the same function again is not compiled again
def _of_row(score_mod: ScoreMod | None, row: int) -> ScoreMod | None:
    """A ``score_mod`` for a call with this row of the batch alone."""
    if score_mod is None:
        return None
    return lambda score, b, h, query, key: score_mod(score, b + row, h, query, key)
