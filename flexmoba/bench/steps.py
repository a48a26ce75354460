"""Measures the time of one decoding step with a cache, and of dense attention over all keys.

The step appends the new keys and values, selects blocks and attends. The dense baselines only
attend. On a GPU, both run as replayed CUDA graphs, like in a server.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexmoba.attention import flex_moba
from flexmoba.bench.baselines import dense_attention, try_to_time
from flexmoba.bench.calls import ROUNDINGS, call_ms, exact_rows, largest_error
from flexmoba.bench.configs import Config
from flexmoba.cache import MobaCache
from flexmoba.gate import moba_select

STEPS = 256  # capacity of the cache for the timed steps, each of which appends a token


def measure_step(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measures one decoding step at the end of the context, and its dense baselines.

    Args:
        config: The configuration.
        device: Device of the inputs.
        dtype: Dtype of the inputs.

    Returns:
        ``error`` and ``allowed``; if the error is allowed, also median milliseconds by name.
    """
    generator = torch.Generator(device).manual_seed(0)
    batch, length, dim = config.batch, config.length, config.head_dim

    def normal(heads: int, n: int) -> Tensor:
        shape = batch, heads, n, dim
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q, k, v = (
        normal(config.heads, 1),
        normal(config.kv_heads, length),
        normal(config.kv_heads, length),
    )
    cache = MobaCache(
        *(batch, config.kv_heads, dim),
        block_size=config.block_size,
        max_len=length + STEPS,
        dtype=dtype,
        device=device,
    )
    new_k, new_v = k[:, :, -1:], v[:, :, -1:]

    def step() -> Tensor:
        return flex_moba(
            q, new_k, new_v, config.block_size, config.topk, cache=cache, gate=config.gate
        )

    with torch.no_grad():
        cache.append(k[:, :, :-1], v[:, :, :-1])
        out, last = step(), torch.tensor([length - 1], device=device)
        selection = moba_select(q, k, config.block_size, config.count, gate=config.gate)
        exact = exact_rows(q, k, v, selection, last, config)
        error, largest = largest_error(out, exact), float(exact.abs().max())
        allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * largest
        result: dict[str, Any] = {"error": error, "allowed": allowed}
        if not error <= allowed:
            return result
        before = functools.partial(cache.crop, length - 1)
        result["step_ms"] = {"flex_moba": replayed_ms(step, device, before)}
        for name, dense in dense_attention(device, is_causal=False).items():
            call = functools.partial(dense, q, k, v)
            result["step_ms"] |= try_to_time(name, functools.partial(replayed_ms, call, device))
    return result


def replayed_ms(
    step: Callable[[], Tensor], device: torch.device, before: Callable[[], object] = lambda: None
) -> float:
    """Returns the median milliseconds of a step; on CUDA, of a replayed CUDA graph of it.

    Args:
        step: The step.
        device: Its device.
        before: A call before each step, such as removing the token that the last step appended, so
            that all steps read as many keys. On CUDA, its time does not count.
    """
    if device.type != "cuda":
        return call_ms(lambda: (before(), step()), device)
    before()
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(55):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times[5:]))
