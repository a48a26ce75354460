"""How fast flex_moba is on this device, beside dense attention, and whether it is right.

Every configuration is first compared with float64 attention on sampled queries; one that disagrees
is reported as wrong and not timed. Times are medians over repeated calls (CUDA events on a GPU),
of the whole call, gate included; all of one run, on one device.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexmoba.attention import flex_moba
from flexmoba.gate import moba_select

SAMPLED_QUERIES = 32
# Allowed errors, of the largest sampled output: half precision is rounded once per part, while in
# float32 many small errors add up.
ROUNDINGS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 64, torch.float64: 64}


@dataclass(frozen=True)
class Config:
    """One row of the table: causal self-attention of random normal inputs."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    block_size: int
    topk: int
    head_dim: int = 128
    backward: bool = True

    def __str__(self) -> str:
        """The first cell of its row."""
        length = f"{self.length // 1024}K" if self.length < 2**20 else f"{self.length // 2**20}M"
        return (
            f"{self.batch} x {self.heads}/{self.kv_heads} x {length}, "
            f"{self.block_size}, {self.topk}"
        )


PRESETS = {
    "cpu": [Config(1, 4, 4, n * 1024, 512, 3, head_dim=64) for n in (4, 8, 16)],
    "quick": [Config(1, 16, 16, 8192, 128, 8), Config(1, 16, 16, 32768, 512, 3)],
    "peers": [
        Config(1, 16, 16, 8192, 128, 8),
        Config(1, 16, 16, 16384, 512, 3),
        Config(1, 32, 8, 32768, 512, 3),
        Config(1, 16, 16, 65536, 512, 3),
        Config(1, 16, 16, 65536, 128, 8),
        Config(1, 16, 16, 131072, 128, 8),
    ],
    "longest": [
        Config(1, 4, 1, 2**17, 4096, 12, backward=False),
        Config(1, 4, 1, 2**20, 4096, 12, backward=False),
        Config(1, 4, 1, 2**20, 1024, 12, backward=False),
        Config(1, 4, 1, 2**20, 16384, 3, backward=False),
    ],
}


def main() -> None:
    """Measures a preset and prints, or writes, the table."""
    parser = argparse.ArgumentParser(prog="python -m flexmoba.bench", description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=PRESETS, default="quick" if on_gpu else "cpu")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    arguments = parser.parse_args()

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    environment = describe(device) | {"dtype": arguments.dtype, "preset": arguments.preset}
    print(", ".join(str(x) for x in environment.values()), flush=True)
    baselines = list(_baselines(device))
    print(_row("batch x heads x length, block, topk", "", "flex_moba ms", *baselines, "peak MiB"))
    print(_row(*["---"] * (len(baselines) + 4)), flush=True)
    results = []
    for config in PRESETS[arguments.preset]:
        result = asdict(config) | measure(config, device, dtype)
        results.append(result)
        _print_result(config, result, baselines)
        if arguments.json:  # after every row, so that what was measured is not lost
            arguments.json.write_text(json.dumps(environment | {"results": results}, indent=1))


def describe(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    if device.type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, "torch": f"torch {torch.__version__}"}


def measure(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Error, milliseconds and peak memory of one configuration."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (config.batch, heads, config.length, config.head_dim)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q, k, v = normal(config.heads), normal(config.kv_heads), normal(config.kv_heads)
    grad = normal(config.heads) if config.backward else None

    def moba() -> Tensor:
        return flex_moba(q, k, v, config.block_size, config.topk)  # type: ignore[return-value]

    result: dict[str, Any] = {}
    with torch.no_grad():
        error, allowed = _error(moba(), q, k, v, config)
        result |= {"error": error, "allowed": allowed}
        if not error <= allowed:
            return result
        result["forward_MiB"] = _peak(moba, device)
        result["forward_ms"] = {"flex_moba": _time(moba, device)}
        result["gate_ms"] = _time(lambda: moba_select(q, k, config.block_size, config.topk), device)
        for name, dense in _baselines(device).items():
            result["forward_ms"][name] = _time(lambda: dense(q, k, v), device)  # noqa: B023
    if grad is None:
        return result

    inputs = [x.requires_grad_() for x in (q, k, v)]

    def both_ways(attention: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attention(), inputs, grad)

    result["both_MiB"] = _peak(both_ways(moba), device)
    result["both_ms"] = {"flex_moba": _time(both_ways(moba), device)}
    for name, dense in _baselines(device).items():
        call = both_ways(lambda: dense(q, k, v))  # noqa: B023
        result["both_ms"][name] = _time(call, device)
    return result


def _baselines(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    backends: dict[str, Any] = {"SDPA": None}
    if device.type == "cuda":
        backends = {
            "SDPA flash": SDPBackend.FLASH_ATTENTION,
            "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        }

    def dense(backend: Any) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gqa = q.shape[1] != k.shape[1]
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return attend

    return {name: dense(backend) for name, backend in backends.items()}


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Config) -> tuple[float, float]:
    """The largest error of sampled queries, and what is allowed."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randint(config.length, (SAMPLED_QUERIES,), generator=generator).to(q.device)
    selection = moba_select(q, k, config.block_size, config.topk)[:, :, sample]
    block_of_key = torch.arange(config.length, device=q.device) // config.block_size
    visible = torch.arange(config.length, device=q.device) <= sample[:, None]
    worst = largest = 0.0
    for b in range(config.batch):
        for h in range(config.heads):
            kv = h // (config.heads // config.kv_heads)
            chosen = torch.zeros_like(visible)
            for slot in selection[b, h].unbind(-1):
                chosen |= block_of_key == slot[:, None]
            scores = q[b, h, sample].double() @ k[b, kv].double().T * config.head_dim**-0.5
            weights = scores.masked_fill(~(chosen & visible), float("-inf")).softmax(-1)
            exact = weights @ v[b, kv].double()
            worst = max(worst, float((out[b, h, sample] - exact).abs().max()))
            largest = max(largest, float(exact.abs().max()))
    return worst, ROUNDINGS[q.dtype] * torch.finfo(q.dtype).eps * largest


def _time(function: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of a call, over about a second and at least three calls."""
    function()
    function()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < 1 and len(times) < 100):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_time = time.perf_counter()
            function()
            times.append((time.perf_counter() - start_time) * 1e3)
    return statistics.median(times)


def _peak(function: Callable[[], Any], device: torch.device) -> float | None:
    """MiB allocated by a call beyond what was there before, its results included."""
    if device.type != "cuda":
        return None
    function()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _print_result(config: Config, result: dict[str, Any], baselines: list[str]) -> None:
    if "forward_ms" not in result:
        print(_row(config, "WRONG", f"error {result['error']:.3g} > {result['allowed']:.3g}"))
        return
    for name, times, memory in (
        ("forward", result["forward_ms"], result["forward_MiB"]),
        ("both ways", result.get("both_ms"), result.get("both_MiB")),
    ):
        if times:
            ours = times["flex_moba"]
            dense = [f"{times[x]:.2f} ({times[x] / ours:.1f}x)" for x in baselines]
            peak = "" if memory is None else f"{memory:.0f}"
            print(_row(config, name, f"{ours:.2f}", *dense, peak), flush=True)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(x) for x in cells) + " |"


if __name__ == "__main__":
    main()
