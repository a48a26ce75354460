"""Measures error, time and memory of one configuration, and time and memory of its baselines."""

import functools
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoba.attention import flex_moba
from flexmoba.bench.baselines import baselines, edges_of, flash_of, try_to_time
from flexmoba.bench.configs import Config
from flexmoba.bench.inputs import inputs_of
from flexmoba.gate import GateOptions, GateSizes, moba_select, select_rows
from flexmoba.reporting import median_ms, median_ms_alone, versions

call_ms = functools.partial(median_ms, seconds=0.4)

SAMPLED_QUERIES = 32
# Allowed error in machine epsilons of the largest sampled output. Half precision rounds each
# partial output once; in float32, many small errors add up.
ROUNDINGS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 64, torch.float64: 64}


def describe(device: torch.device) -> dict[str, str | None]:
    """Returns the device and the versions, on which the times depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    if device.type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, **versions()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the TFLOP/s of one large matrix product, an upper bound for this device."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / call_ms(lambda: x @ x, device) / 1e9


def measure(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measures one configuration and its baselines.

    Args:
        config: The configuration.
        device: Device of the inputs.
        dtype: Dtype of the inputs.

    Returns:
        ``error`` and ``allowed``; if the error is allowed, also median milliseconds by name and
        peak memory in MiB, and ``failed``, an error message, if the memory does not suffice for the
        backward pass.
    """
    q, k, v, grad = inputs_of(config, device, dtype)

    options: dict[str, Any] = {"gate": config.gate}
    if config.documents > 1:
        options["cu_seqlens"] = edges_of(config, device)

    longest = max(config.lengths) if config.longest_known else None

    def moba() -> Tensor:
        out: Tensor = flex_moba(
            q, k, v, config.block_size, config.topk, **options, max_seqlen=longest
        )
        return out

    def gate() -> Tensor:
        if config.documents > 1:
            return moba_select(q, k, config.block_size, config.count, **options)
        sizes = GateSizes(config.block_size, config.count - 1, offset=0, is_causal=True)
        return select_rows(q, k, sizes, GateOptions(config.gate))

    result: dict[str, Any] = {}
    with torch.no_grad():
        error, allowed = _error(moba(), q, k, v, config, options)
        result |= {"error": error, "allowed": allowed}
        if not error <= allowed:
            return result
        result |= time_forward(moba, (q, k, v), config, device)
        if config.topk is not None:
            calls = 1 if result["forward_ms"][config.name] > 1000 else 3
            result["split_ms"] = _split(moba, gate, device, calls)
    if config.backward:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        try:
            result |= time_both(moba, inputs, grad, config, device)
        except torch.OutOfMemoryError as error:
            result["failed"] = failure(error)
    return result


def failure(error: Exception) -> str:
    """Returns the type and the first line of an error, for a report."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def time_forward(
    call: Callable[[], Tensor], qkv: Sequence[Tensor], config: Config, device: torch.device
) -> dict[str, Any]:
    """Returns the peak memory of a forward call, and its time and those of its baselines."""
    result: dict[str, Any] = {"forward_MiB": _peak(call, device)}
    result["forward_ms"] = {config.name: call_ms(call, device)}
    if device.type == "cuda":
        result["forward_alone_ms"] = median_ms_alone(call, device)
    for name, other in baselines(config, device).items():
        result["forward_ms"] |= _time(name, functools.partial(other, *qkv), device)
    return result


def time_both(
    call: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    config: Config,
    device: torch.device,
) -> dict[str, Any]:
    """Returns memory and times of forward and backward; the first inputs are q, k and v."""

    def both_ways(attention: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attention(), inputs, grad)

    ours = both_ways(call, inputs)
    ours()  # compiles
    result: dict[str, Any] = {"both_MiB": _peak(ours, device)}
    result["both_ms"] = {config.name: call_ms(ours, device)}
    if device.type == "cuda":
        result["both_alone_ms"] = median_ms_alone(ours, device)
    for name, other in baselines(config, device).items():
        both = both_ways(functools.partial(other, *inputs[:3]), inputs[:3])
        result["both_ms"] |= _time(name, both, device)
    return result


def _time(name: str, call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    with flash_of(name):
        return try_to_time(name, functools.partial(call_ms, call, device))


def _split(
    moba: Callable[[], Any], gate: Callable[[], Any], device: torch.device, calls: int
) -> dict[str, float] | None:
    """Returns the GPU milliseconds of each stage of a forward call; None on CPU.

    The kernel that merges partial outputs also attends to the own blocks, so one entry counts both.
    """
    if device.type != "cuda":
        return None
    gate()  # compiles
    kernels, gate_ms = _kernel_ms(moba, calls), sum(_kernel_ms(gate, calls).values())
    attention = sum(kernels.get(name, 0) for name in ("attend_kernel", "hopper_attend_kernel"))
    merge = sum(ms for name, ms in kernels.items() if name == "finish_kernel")
    if not merge:  # a backend other than fused
        return {"gate": gate_ms, "rest": sum(kernels.values()) - gate_ms}
    routing = sum(kernels.values()) - gate_ms - attention - merge
    return {"gate": gate_ms, "routing": routing, "attention": attention, "own and merge": merge}


def _kernel_ms(function: Callable[[], Any], calls: int) -> dict[str, float]:
    """Returns the milliseconds of each CUDA kernel in a compiled call, by name."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e3 / calls
        for event in profile.key_averages()
        if event.self_device_time_total
    }


def _error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Config, options: dict[str, Any]
) -> tuple[float, float]:
    """Returns the largest error of sampled queries, and the allowed error."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randint(config.length, (SAMPLED_QUERIES,), generator=generator).to(q.device)
    selection = None
    if config.topk is not None:
        selection = moba_select(q, k, config.block_size, config.count, **options)[:, :, sample]
    exact = exact_rows(q[:, :, sample], k, v, selection, sample, config)
    largest = float(exact.abs().max())
    error = largest_error(out[:, :, sample], exact)
    return error, ROUNDINGS[q.dtype] * torch.finfo(q.dtype).eps * largest


def largest_error(out: Tensor, exact: Tensor) -> float:
    """Returns the largest absolute difference.

    A NaN counts as the largest float, because NaN compares as no error and JSON cannot hold it.
    """
    return float((out - exact).abs().nan_to_num(nan=sys.float_info.max).max())


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor | None, position: Tensor, config: Config
) -> Tensor:
    """Computes the attention of some queries in float64, one head at a time.

    Args:
        q: Queries, ``(B, Hq, n, D)``.
        k: Keys, ``(B, Hkv, L, D)``, in the dtype of ``q``.
        v: Values, ``(B, Hkv, L, Dv)``, in the dtype of ``q``.
        selection: The selected blocks of each query, ``(B, Hq, n, topk)`` int32; None for all.
        position: The position of each query, ``(n,)`` int64.
        config: The configuration.

    Returns:
        The attention, ``(B, Hq, n, Dv)`` float64.
    """
    key = torch.arange(k.shape[2], device=q.device)
    first, blocks_before = torch.zeros_like(key), torch.zeros_like(key)
    if config.documents > 1:  # block indices count over all documents of a row
        lengths = torch.tensor(config.lengths, device=q.device)
        blocks = -(-lengths // config.block_size)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        blocks_before = (blocks.cumsum(0) - blocks).repeat_interleave(lengths)
    block_of_key = blocks_before + (key - first) // config.block_size
    visible = (key <= position[:, None]) & (first == first[position][:, None])
    exact = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float64, device=q.device)
    for b in range(config.batch):
        for h in range(config.heads):
            kv = h // (config.heads // config.kv_heads)
            selected = visible
            if selection is not None:
                selected = torch.zeros_like(visible)
                for block in selection[b, h].unbind(-1):
                    selected |= block_of_key == block[:, None]
            scores = q[b, h].double() @ k[b, kv].double().T * config.head_dim**-0.5
            weights = scores.masked_fill(~(selected & visible), float("-inf")).softmax(-1)
            exact[b, h] = weights @ v[b, kv].double()
    return exact


def _peak(function: Callable[[], Any], device: torch.device) -> float | None:
    """Returns the peak MiB that a compiled call allocates, with its results; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
