"""A decoding step of Native Sparse Attention: few queries, each of which gathers what it reads.

arXiv 2502.11089, Sec. 3.2 and 3.3. A step reads all compressed keys once, for the compressed branch
and for the importance of blocks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flexmoba.cache import has_kernels
from flexmoba.gate import forced_blocks, top_blocks
from flexmoba.nsa.select import block_importance
from flexmoba.nsa.sizes import NsaSizes
from flexmoba.nsa.tensors import BranchTensors
from flexmoba.runtime import without_autocast


def attend_step(
    q: Tensor,
    gates: Tensor,
    positions: Tensor,
    cache: BranchTensors,
    sizes: NsaSizes,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `NsaCache.attend` for few queries.

    Args:
        q: Queries, ``(B, Hq, n, D)``.
        gates: Gate values, ``(B, Hq or 1, n, 3)``.
        positions: Position of each query, ``(B, n)`` int32; -1 for padding.
        cache: Keys and values of a cache. The last block, the last compressed block and the last
            entry of the ring of the window branch are never read. Token ``i`` has the index
            ``i % (entries - 1)`` in the ring.
        sizes: Sizes of the blocks and of the selection.
        window: Tokens in a window, 0 for no window branch.
        scale: Factor on the scores.

    Returns:
        The output ``(B, Hq, n, Dv)`` in the dtype of ``q``, and the log-sum-exps ``(B, Hq, n, 3)``.
        Both are NaN for a query whose position is beyond the capacity.
    """
    out, lse = _attend_step(q, gates, positions, *cache, *sizes, window, scale)
    return out, lse


# An operator, so that compilers do not trace it: the launches of kernels are not traceable. The
# arguments are flat because the schema of an operator has no tuples.
@torch.library.custom_op("flexmoba::attend_nsa_step", mutates_args=())
@without_autocast
def _attend_step(
    q: Tensor,
    gates: Tensor,
    positions: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    cmp_block: int,
    cmp_stride: int,
    block_size: int,
    topk: int,
    sink_blocks: int,
    local_blocks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    cache = BranchTensors(k, v, k_cmp, v_cmp, k_win, v_win)
    sizes = NsaSizes(cmp_block, cmp_stride, block_size, topk, sink_blocks, local_blocks)
    call = (q, gates, positions, cache, sizes, window, scale)
    if has_kernels(q, v) and q.numel() > 0:
        from flexmoba.nsa.decode_on_cuda import attend_step_on_cuda, supports

        if supports(q, v, q.shape[1] // k.shape[1], sizes):
            return attend_step_on_cuda(*call)
    return attend_gathered(*call)


@_attend_step.register_fake
def _(q: Tensor, gates: Tensor, positions: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    shape = q.shape[:3]
    return q.new_empty((*shape, v.shape[3])), q.new_empty((*shape, 3), dtype=lse_dtype)


def attend_gathered(
    q: Tensor,
    gates: Tensor,
    positions: Tensor,
    cache: BranchTensors,
    sizes: NsaSizes,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `attend_step` by plain tensor operations, which gather the keys."""
    capacity = cache.k.shape[2] - sizes.block_size
    beyond = (positions >= capacity)[:, None, :, None]
    positions = positions.clamp(max=capacity - 1)
    precise = torch.promote_types(q.dtype, torch.float32)
    queries = rearrange(q.to(precise) * scale, "b (h g) l d -> b h l g d", h=cache.k.shape[1])
    position = positions[:, None, :, None]  # (B, Hkv, n, keys)
    block = torch.arange(cache.k_cmp.shape[2], device=q.device)
    seen = block * sizes.cmp_stride + sizes.cmp_block - 1 <= position
    keys, values = cache.k_cmp[:, :, None], cache.v_cmp[:, :, None]
    compressed, weights = _attend(queries, keys, values, seen)

    n_blocks = cache.k.shape[2] // sizes.block_size
    importance = block_importance(weights.sum(3), n_blocks, sizes)
    selected = _select(importance, positions, sizes)
    token = selected[..., None] * sizes.block_size + torch.arange(sizes.block_size, device=q.device)
    seen = ((token <= position[..., None]) & (selected >= 0)[..., None]).flatten(3)
    index = selected.clamp(min=0)
    keys, values = (_blocks(x, index, sizes.block_size) for x in (cache.k, cache.v))
    selected_results, _ = _attend(queries, keys, values, seen)

    results = [compressed, selected_results]
    if window > 0:
        token = position - torch.arange(min(window, capacity), device=q.device)
        index = token.clamp(min=0) % (cache.k_win.shape[2] - 1)
        index = index.expand(-1, cache.k.shape[1], -1, -1)
        keys, values = (_blocks(x, index, 1) for x in (cache.k_win, cache.v_win))
        results.append(_attend(queries, keys, values, token >= 0)[0])

    outs, lses = zip(*results, strict=True)
    factors = gates[..., None, : len(outs)].to(precise)
    out = (torch.stack(outs, -1) * factors).sum(-1)
    out = out.masked_fill((positions < 0)[:, None, :, None], 0.0)  # gate values may be NaN there
    lse = F.pad(torch.stack(lses, -1), (0, gates.shape[-1] - len(lses)), value=-math.inf)
    out, lse = (x.masked_fill(beyond, math.nan) for x in (out, lse))
    return out.to(q.dtype), lse


def _select(importance: Tensor, positions: Tensor, sizes: NsaSizes) -> Tensor:
    """Returns the selected blocks of each query, ``(B, Hkv, n, topk)`` int32."""
    own = positions.clamp(min=0) // sizes.block_size
    columns = [own[:, None, :, None], forced_blocks(own[:, :1] * 0, own, sizes.gate)]
    if sizes.scored:
        first, end = torch.full_like(own, sizes.sink_blocks), own - sizes.local_blocks
        columns.append(top_blocks(importance, first[:, None], end[:, None], sizes.scored))
    shape = (*importance.shape[:3], -1)
    return torch.cat([x.expand(shape) for x in columns if x is not None], dim=-1)


def _blocks(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Gathers blocks of ``size`` tokens: ``(B, Hkv, n, columns * size, D)``.

    ``x`` is ``(B, Hkv, N * size, D)``, and ``index`` is ``(B, Hkv, n, columns)``.
    """
    batch, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
    blocks: Tensor = x.unflatten(2, (-1, size))
    gathered: Tensor = blocks[batch[:, None, None, None], heads[:, None, None], index.long()]
    return gathered.flatten(3, 4)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Computes attention to gathered keys, in the dtype of the queries.

    Args:
        queries: Scaled queries, ``(B, Hkv, n, G, D)``.
        keys: ``(B, Hkv, n or 1, keys, D)``.
        values: ``(B, Hkv, n or 1, keys, Dv)``.
        seen: Bools that expand to ``(B, Hkv, n, keys)``.

    Returns:
        A pair of the output ``(B, Hq, n, Dv)`` and the log-sum-exp ``(B, Hq, n)``, and the softmax
        weights ``(B, Hkv, n, G, keys)``; zeros and -inf for a query that sees no key.
    """
    scores = queries @ keys.to(queries.dtype).mT
    scores = scores.masked_fill(~seen[:, :, :, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    # Masked values may be NaN, such as values from before a reset, and 0 * NaN is NaN.
    values = values.masked_fill(~seen[..., None], 0.0)
    out = weights @ values.to(queries.dtype)
    out, lse = (rearrange(x, "b h l g ... -> b (h g) l ...") for x in (out, lse))
    return (out, lse), weights
