"""Measures a batch of a server over pages, beside a cache and dense attention of the same keys.

The pages have vLLM's layout, one run of keys, values and mean key for each page and KV head, and
are in random order. A call appends the new tokens and attends. On a GPU, batches of decoding steps
run as replayed CUDA graphs; a batch with a prefill chunk reads lengths back to the host, so it has
no graph, and no baseline but full attention over the same pages.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.attention import flex_moba
from flexmoba.bench.baselines import dense_attention, try_to_time
from flexmoba.bench.calls import ROUNDINGS, call_ms, exact_rows, largest_error
from flexmoba.bench.configs import Config
from flexmoba.bench.steps import STEPS, replayed_ms
from flexmoba.blocks import ceil_div
from flexmoba.cache import MobaCache
from flexmoba.gate import block_means, moba_select
from flexmoba.paged import Pages, append_paged, attend_paged, paged_batch

_SAMPLED = 8  # queries of a chunk whose outputs are compared


def measure_paged(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measures one batch over pages.

    Args:
        config: The configuration: ``batch`` sequences with one new token and, if ``chunk`` is not
            0, another one with that many. All end at ``length`` tokens.
        device: Device of the inputs.
        dtype: Dtype of the inputs.

    Returns:
        ``error`` and ``allowed``; if the error is allowed, also median milliseconds by name.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, config.head_dim, device=device, dtype=dtype, generator=generator)

    new = [1] * config.batch + [config.chunk] * (config.chunk > 0)
    length, size = config.length, config.block_size
    k, v = (normal(len(new), config.kv_heads, length) for _ in range(2))
    q = normal(sum(new), config.heads)
    pages, table = _pages_of(k, v, size, generator)

    def new_tokens(x: Tensor) -> Tensor:
        """Returns the last tokens of all sequences, ``(T, Hkv, D)``."""
        return torch.cat([x[i, :, length - n :].transpose(0, 1) for i, n in enumerate(new)])

    new_k, new_v = new_tokens(k), new_tokens(v)
    lengths = torch.full((len(new),), length, dtype=torch.int32, device=device)
    bounds = F.pad(torch.tensor(new), (1, 0)).cumsum(0).int().to(device)
    batch = paged_batch(
        bounds, lengths, table, tokens=sum(new), max_query_len=None if config.chunk else 1
    )
    page = table[batch.rows.long(), (batch.positions // size).long()]
    slots = page.long() * size + batch.positions % size

    def step(topk: int | None) -> Tensor:
        append_paged(new_k, new_v, pages, slots)
        return attend_paged(q, pages, batch, topk, gate=config.gate)[0]

    with torch.no_grad():
        error, largest = _error(step(config.topk), q, k, v, new, config)
        allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * largest
        result: dict[str, Any] = {"error": error, "allowed": allowed}
        if not error <= allowed:
            return result
        time = call_ms if config.chunk else replayed_ms
        times = {"flex_moba": time(lambda: step(config.topk), device)}
        if not config.chunk:
            times |= {"MobaCache": _cached_ms(q, k, v, config)}
        times |= try_to_time("topk=None", lambda: time(lambda: step(None), device))
        dense = {} if config.chunk else dense_attention(device, is_causal=False)
        for name, attention in dense.items():
            call = functools.partial(attention, q[:, :, None], k, v)
            times |= try_to_time(name, functools.partial(replayed_ms, call, device))
    return result | {"step_ms": times}


def _pages_of(k: Tensor, v: Tensor, size: int, generator: torch.Generator) -> tuple[Pages, Tensor]:
    """Returns pages with the keys and values ``(B, Hkv, L, D)``, and the block table ``(B, N)``."""
    batch, heads, length, dim = k.shape
    n = ceil_div(length, size)
    order = torch.randperm(batch * n, device=k.device, generator=generator)
    # As in vLLM, the mean key takes ceil(D / size) features of every token.
    run = k.new_zeros(batch * n, heads, size * (2 * dim + ceil_div(dim, size)))
    pages = Pages(
        run[..., : size * dim].unflatten(2, (size, dim)),
        run[..., size * dim : 2 * size * dim].unflatten(2, (size, dim)),
        run[..., 2 * size * dim :][..., :dim],
    )
    table = order.view(batch, n)
    for i in range(batch):  # one sequence at a time, to need little memory
        for x, to in ((k[i], pages.k), (v[i], pages.v)):
            blocks = F.pad(x, (0, 0, 0, n * size - length)).unflatten(1, (n, size))
            to[table[i]] = blocks.transpose(0, 1)
        pages.means[table[i]] = block_means(k[i : i + 1], size)[0].transpose(0, 1)
    return pages, table.int()


def _cached_ms(q: Tensor, k: Tensor, v: Tensor, config: Config) -> float:
    """Returns the median milliseconds of a step of `MobaCache` at the same lengths."""
    cache = MobaCache(
        *(config.batch, config.kv_heads, config.head_dim),
        block_size=config.block_size,
        max_len=config.length + STEPS,
        dtype=k.dtype,
        device=k.device,
    )
    cache.append(k[:, :, :-1], v[:, :, :-1])
    options: dict[str, Any] = {"cache": cache, "gate": config.gate}
    new = q[:, :, None], k[:, :, -1:], v[:, :, -1:]

    def step() -> Tensor:
        out: Tensor = flex_moba(*new, config.block_size, config.topk, **options)
        return out

    return replayed_ms(step, k.device, functools.partial(cache.crop, config.length - 1))


def _error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, new: list[int], config: Config
) -> tuple[float, float]:
    """Compares the first and the last step, and sampled queries of the chunk, with float64.

    Returns:
        The largest error, and the largest exact value.
    """
    assert config.topk is not None
    errors, largest, begin, alone = [], 0.0, 0, replace(config, batch=1)
    for i, n in enumerate(new):
        tokens, begin = slice(begin, begin + n), begin + n
        if 0 < i < config.batch - 1:
            continue
        keys, values = k[i : i + 1], v[i : i + 1]
        queries, found = (x[tokens].transpose(0, 1)[None] for x in (q, out))
        selection = moba_select(queries, keys, config.block_size, config.topk, gate=config.gate)
        sample = torch.linspace(0, n - 1, min(n, _SAMPLED), device=q.device).long()
        position = config.length - n + sample
        rows = queries[:, :, sample], keys, values, selection[:, :, sample]
        exact = exact_rows(*rows, position, alone)
        errors.append(largest_error(found[:, :, sample], exact))
        largest = max(largest, float(exact.abs().max()))
    return max(errors), largest
