"""How fast flex_moba is on this device, beside dense attention, and whether it is right.

Every configuration is first compared with float64 attention on sampled queries; one that disagrees
is reported as wrong and not timed. Times are medians over repeated calls (CUDA events on a GPU),
of the whole call, gate included; all of one run, on one device.
"""

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexmoba.attention import flex_moba
from flexmoba.gate import Gate, moba_select, select_candidates

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
    dense: str = "all"  # what it is compared with: all, SDPA (without FlexAttention) or nothing

    def __str__(self) -> str:
        """The first cell of its row."""
        length = str(self.length)
        for unit, size in (("M", 2**20), ("K", 2**10)):
            if self.length % size == 0:
                length = f"{self.length // size}{unit}"
                break
        return (
            f"{self.batch} x {self.heads}/{self.kv_heads} x {length}, "
            f"{self.block_size}, {self.topk}"
        )

    @property
    def dense_pairs(self) -> int:
        """Pairs of a query and a key that causal attention multiplies, of one head."""
        return self.length * (self.length + 1) // 2

    @property
    def pairs(self) -> int:
        """Those that MoBA multiplies: the own block up to the query, and whole past ones."""
        blocks, rest = divmod(self.length, self.block_size)
        sizes = [self.block_size] * blocks + [rest]
        own = sum(size * (size + 1) // 2 for size in sizes)
        return own + sum(
            size * min(self.topk - 1, block) * self.block_size for block, size in enumerate(sizes)
        )

    def flop(self, *, backward: bool) -> int:
        """Floating point operations of its matrix products; the backward pass has 5 for 2."""
        products = 7 if backward else 2
        return 2 * products * self.batch * self.heads * self.pairs * self.head_dim


PRESETS = {
    "cpu": [Config(1, 4, 4, n * 1024, 512, 3, head_dim=64) for n in (4, 8, 16)],
    "quick": [Config(1, 16, 16, 8192, 128, 8), Config(1, 16, 16, 32768, 512, 3)],
    "flashmoba": [
        Config(1, 16, 16, 8192, 128, 8),
        Config(1, 16, 16, 16384, 512, 3),
        Config(1, 32, 8, 32768, 512, 3),
        Config(1, 16, 16, 65536, 512, 3),
        Config(1, 16, 16, 65536, 128, 8),
        Config(1, 16, 16, 131072, 128, 8, dense="SDPA"),
    ],
    "paper": [
        Config(1, 4, 1, 2**17, 4096, 12, dense="SDPA"),
        Config(1, 4, 1, 2**20, 4096, 12, dense="SDPA"),
    ],
    "longest": [
        Config(1, 4, 1, 2**20, 1024, 12, backward=False, dense="SDPA"),
        Config(1, 4, 1, 2**20, 16384, 3, backward=False, dense="SDPA"),
        Config(1, 1, 1, 10 * 2**20, 163840, 3, backward=False, dense="nothing"),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flexmoba bench``."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+",
        default=["quick" if on_gpu else "cpu"],
        help="which configurations (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="cuda or cpu")
    parser.add_argument(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in ROUNDINGS],
        default="bfloat16" if on_gpu else "float32",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE, too")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the times (needs matplotlib)"
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="show an earlier --json FILE; measure nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints, or writes, the tables; 1 if a result was wrong, 2 if none is made."""
    problem = _why_not_written(arguments)
    if problem:  # found out before anything is measured, not after
        print(problem, file=sys.stderr)
        return 2
    earlier = arguments.show
    report = json.loads(earlier.read_text()) if earlier else _measure_all(arguments)
    print(tables(report))
    if arguments.plot:
        plot(report, arguments.plot)
    return int(any("forward_ms" not in result for result in report["results"]))


def _why_not_written(arguments: argparse.Namespace) -> str | None:
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib; pip install 'flexmoba[plot]'"
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path and not path.parent.is_dir():
            return f"{option} {path}: there is no folder {path.parent}; make it first"
    if arguments.show and not arguments.show.is_file():
        return f"--show {arguments.show}: there is no such file; --json writes one"
    return None


def _measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    configs = [config for preset in arguments.preset for config in PRESETS[preset]]
    report: dict[str, Any] = {
        "command": f"flexmoba bench --preset {' '.join(arguments.preset)}",
        **describe(device),
        "dtype": arguments.dtype,
        "matrix_tflops": matrix_rate(device, dtype),
        "results": [],
    }
    print(*(f"{key}: {value}" for key, value in report.items() if key != "results"), sep="\n")
    for config in _progress(configs):
        report["results"].append(asdict(config) | measure(config, device, dtype))
        if arguments.json:  # after every row, so that what was measured is not lost
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _progress(configs: list[Config]) -> Iterator[Config]:
    """Shows which configuration runs, if tqdm is there to show it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from configs
        return
    bar = tqdm(configs, file=sys.stderr, leave=False, disable=None)
    for config in bar:
        bar.set_description(str(config))
        yield config


def describe(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    if device.type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product: what this device can do at best."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _time(lambda: x @ x, device) / 1e9


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

    def gate() -> Tensor:
        return select_candidates(q, k, config.block_size, config.topk - 1, Gate(), is_causal=True)

    result: dict[str, Any] = {}
    with torch.no_grad():
        error, allowed = _error(moba(), q, k, v, config)
        result |= {"error": error, "allowed": allowed}
        if not error <= allowed:
            return result
        result["forward_MiB"] = _peak(moba, device)
        result["split_ms"] = _split(moba, gate, device)
        result["forward_ms"] = {"flex_moba": _time(moba, device)}
        for name, dense in _baselines(config, device).items():
            forward = functools.partial(dense, q, k, v)
            result["forward_ms"] |= _baseline_time(name, forward, device)
    if grad is None:
        return result

    inputs = [x.requires_grad_() for x in (q, k, v)]

    def both_ways(attention: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attention(), inputs, grad)

    result["both_MiB"] = _peak(both_ways(moba), device)
    result["both_ms"] = {"flex_moba": _time(both_ways(moba), device)}
    for name, dense in _baselines(config, device).items():
        call = both_ways(functools.partial(dense, q, k, v))
        result["both_ms"] |= _baseline_time(name, call, device)
    return result


def _baseline_time(
    name: str, function: Callable[[], Any], device: torch.device
) -> dict[str, float]:
    """Its time by its name; nothing if this machine lacks it, which costs no other result."""
    try:
        return {name: _time(function, device)}
    except RuntimeError as error:
        print(f"{name} failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return {}


def _baselines(config: Config, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    if config.dense == "nothing":
        return {}
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

    baselines = {name: dense(backend) for name, backend in backends.items()}
    if config.dense == "all" and device.type == "cuda":
        baselines["FlexAttention"] = _dense_flex_attention
    return baselines


def _dense_flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_moba(q, k, v, q.shape[2], None, impl="masked")  # type: ignore[return-value]


def _split(
    moba: Callable[[], Any], gate: Callable[[], Any], device: torch.device
) -> dict[str, float] | None:
    """Milliseconds on the GPU of the stages of a forward call; None where there are no kernels.

    Own blocks are attended where the parts are merged, so they are counted there.
    """
    if device.type != "cuda":
        return None
    kernels, of_gate = _kernel_ms(moba), sum(_kernel_ms(gate).values())
    attention = sum(ms for name, ms in kernels.items() if name == "attend_kernel")
    merge = sum(ms for name, ms in kernels.items() if name == "finish_kernel")
    if not merge:  # another implementation
        return {"gate": of_gate, "rest": sum(kernels.values()) - of_gate}
    routing = sum(kernels.values()) - of_gate - attention - merge
    return {"gate": of_gate, "routing": routing, "attention": attention, "own and merge": merge}


def _kernel_ms(function: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    function()
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
    """Median milliseconds of a call, over about a second; of three calls if slow, or one."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    function()
    # Of calls that take seconds, one must do.
    least = 1 if time.perf_counter() - began > 2 else 3
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (time.perf_counter() - began < 1 and len(times) < 100):
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
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---- Reports ------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> str:
    """A report as Markdown: times forward and both ways, then where the forward time goes."""
    results = [(_config(result), result) for result in report["results"]]
    parts = []
    for title, backward in (("Forward", False), ("Forward and backward", True)):
        rows = [
            row
            for config, result in results
            if (row := _times_row(config, result, report, backward))
        ]
        if rows:
            dense = [name for name in DENSE if any(name in row for row in rows)]
            heads = [_CONFIG, "sparsity", "flex_moba ms", "TFLOP/s", "of a matmul's", *dense]
            parts.append(f"{title}\n\n{_table([*heads, _MIB], rows)}")
    splits = [
        {_CONFIG: str(config), "all": f"{result['forward_ms']['flex_moba']:.2f}"}
        | {stage: f"{ms:.2f}" for stage, ms in result["split_ms"].items()}
        for config, result in results
        if result.get("split_ms")
    ]
    if splits:
        stages = list(dict.fromkeys(stage for row in splits for stage in row))
        parts.append(f"Where the forward time goes, in ms\n\n{_table(stages, splits)}")
    return "\n\n".join(parts)


DENSE = ("SDPA", "SDPA flash", "SDPA cuDNN", "FlexAttention")
_CONFIG, _MIB = "batch x heads x length, block, topk", "peak MiB"


def _config(result: dict[str, Any]) -> Config:
    return Config(**{field.name: result[field.name] for field in fields(Config)})


def _times_row(
    config: Config, result: dict[str, Any], report: dict[str, Any], backward: bool
) -> dict[str, str] | None:
    if "forward_ms" not in result:
        wrong = f"WRONG: error {result['error']:.3g} > {result['allowed']:.3g}"
        return {_CONFIG: str(config), "flex_moba ms": wrong}
    times = result.get("both_ms") if backward else result["forward_ms"]
    if not times:
        return None
    ours, memory = times["flex_moba"], result["both_MiB" if backward else "forward_MiB"]
    rate = config.flop(backward=backward) / ours / 1e9
    return {
        _CONFIG: str(config),
        "sparsity": f"{1 - config.pairs / config.dense_pairs:.1%}",
        "flex_moba ms": f"{ours:.2f}",
        "TFLOP/s": f"{rate:.3g}",
        "of a matmul's": f"{rate / report['matrix_tflops']:.0%}",
        **{name: f"{ms:.2f} ({ms / ours:.1f}x)" for name, ms in times.items() if name in DENSE},
        _MIB: "" if memory is None else f"{memory:.0f}",
    }


def _table(heads: list[str], rows: list[dict[str, str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the times of a report as bars, forward and both ways."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.55 * len(report["results"])), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, key in zip(
        panels, ("forward", "forward and backward"), ("forward_ms", "both_ms"), strict=True
    ):
        names = ["flex_moba", *DENSE]
        results = [result for result in report["results"] if "forward_ms" in result]
        names = [name for name in names if any(name in (r.get(key) or ()) for r in results)]
        for i, name in enumerate(names):
            at = [y + (i - (len(names) - 1) / 2) * 0.8 / len(names) for y in range(len(results))]
            times = [(result.get(key) or {}).get(name, float("nan")) for result in results]
            axes.barh(at, times, 0.8 / len(names), label=name)
        axes.set(title=f"{title}, milliseconds", xscale="log")
        axes.set_yticks(range(len(results)), [str(_config(result)) for result in results])
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['dtype']}")
    figure.savefig(path, dpi=120)
