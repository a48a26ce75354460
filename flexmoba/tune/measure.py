"""Measures a grid of block sizes and topks on given queries and keys."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoba.attention import flex_moba
from flexmoba.blocks import ceil_div
from flexmoba.checks import check_positive, check_queries_and_keys
from flexmoba.reporting import median_ms, note, progress, versions
from flexmoba.tune.calls import Call, sample_positions
from flexmoba.tune.quality import Gate, Quality, gate_qualities, required_snr
from flexmoba.tune.report import Choice, Report


def tune(
    calls: Sequence[Call | tuple[Tensor, Tensor]],
    block_sizes: Sequence[int] = (64, 128, 256, 512),
    topks: Sequence[int] = (2, 3, 4, 8),
    *,
    gate_block_sizes: Sequence[int] = (),
    sink_blocks: int = 0,
    local_blocks: int = 0,
    queries: int = 256,
    timed: bool = True,
    backward: bool = False,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> Report:
    """Measures block sizes and topks on given queries and keys.

    For each call, it computes the share of full attention that the blocks selected by the gate of
    arXiv 2502.13189, Sec. 2.2, capture, the best possible share, and the signal-to-noise ratio of
    the gate (arXiv 2511.11571, Sec. 3), as `flexmoba.tune.gate_quality` defines them. At the shape
    of the longest call, it times `flex_moba` and ``scaled_dot_product_attention`` on random values,
    since the time does not depend on the values. Captured mass shows how much attention the model
    loses if `flex_moba` replaces full attention without training; a model trained with it loses
    less.

    Args:
        calls: Calls recorded by `capture`, or pairs of q ``(B, Hq, L, D)`` and k
            ``(B, Hkv, L, D)``. Calls with the same name are batches of one layer. All pairs are
            batches of one layer.
        block_sizes: Numbers of keys in a block, each at least 1.
        topks: Numbers of blocks that a query attends to, including its own block. A topk that
            selects all blocks of the longest call is omitted, because that is full attention.
        gate_block_sizes: Numbers of keys in a sub-block to measure, in addition to the gate without
            sub-blocks, with every larger block size that the number divides.
        sink_blocks: Number of first blocks that are always selected. They count towards each topk.
        local_blocks: Number of blocks right before the own block that are always selected. They
            count towards each topk.
        queries: Number of queries to sample of each pair. A `Call` already holds a sample.
        timed: Whether to measure times.
        backward: Whether to also time forward and backward together.
        device: Device of the measurement, by default the device of the longest call.
        show_progress: Whether to print progress to standard error.

    Returns:
        A `Report`. It omits choices that fail while they are timed, for example for lack of
        memory, with a warning for each.

    Raises:
        RuntimeError: Every choice failed.
        TypeError: An argument has the wrong type.
        ValueError: There is nothing to measure, or shapes, dtypes or sizes do not fit.

    Examples:
        >>> import torch
        >>> from flexmoba.tune import tune
        >>> q, k = torch.randn(2, 1, 2, 400, 16)
        >>> report = tune([(q, k)], block_sizes=(50, 100), topks=(2, 3), timed=False)
        >>> [(x.block_size, x.topk, round(x.sparsity, 2)) for x in report.choices]
        [(50, 2, 0.65), (50, 3, 0.47), (100, 2, 0.37), (100, 3, 0.12)]
    """
    *_, report = reports(
        calls,
        block_sizes,
        topks,
        gate_block_sizes=gate_block_sizes,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        queries=queries,
        timed=timed,
        backward=backward,
        device=device,
        show_progress=show_progress,
    )
    return report


def reports(
    calls: Sequence[Call | tuple[Tensor, Tensor]],
    block_sizes: Sequence[int],
    topks: Sequence[int],
    *,
    gate_block_sizes: Sequence[int],
    sink_blocks: int,
    local_blocks: int,
    queries: int,
    timed: bool,
    backward: bool,
    device: torch.device | str | None,
    show_progress: bool,
) -> Iterator[Report]:
    """Yields the report of `tune` after each choice, with the choices measured so far."""
    samples = [x if isinstance(x, Call) else sampled(*x, queries) for x in calls]
    if not samples:
        raise ValueError(
            "nothing to measure: calls is empty; record calls by `capture`, or pass pairs (q, k)"
        )
    longest = max(samples, key=lambda x: x.k.shape[2])
    device = torch.device(device or longest.q.device)
    sizes = _grid(longest.k.shape[2], block_sizes, gate_block_sizes, topks)
    grid = {Gate(*x, sink_blocks, local_blocks): kept for x, kept in sizes.items()}
    topks = sorted({topk for kept in grid.values() for topk in kept})
    shown = progress(samples, "captured mass") if show_progress else samples
    measured = _qualities(shown, grid, topks, device)

    timer = _Timer(longest, device, backward=backward) if timed else None
    dense: tuple[float | None, float | None] = (None, None)
    if timer:
        try:
            dense = timer(_dense)
        except RuntimeError as error:  # mostly out of memory, which need not end the other runs
            warnings.warn(
                f"dense attention failed and was not timed: {_first_line(error)}", stacklevel=3
            )
    choices: list[Choice] = []
    settings = [(gate, topk) for gate in grid for topk in grid[gate]]
    for i, (gate, topk) in enumerate(settings, 1):
        if timed and show_progress:
            note(f"time {i} of {len(settings)}: {_name(gate, topk)}")

        def moba(q: Tensor, k: Tensor, v: Tensor, gate: Gate = gate, topk: int = topk) -> Any:
            return flex_moba(q, k, v, topk=topk, **gate._asdict())

        try:
            times = timer(moba) if timer else (None, None)
        except RuntimeError as error:
            failed = f"{_name(gate, topk)} failed and was omitted"
            warnings.warn(f"{failed}: {_first_line(error)}", stacklevel=3)
            if (gate, topk) == settings[-1] and not choices:
                raise
            continue
        layers = [[x[gate] for x in batches] for batches in measured.values()]
        row = topks.index(topk)
        choices.append(_choice(longest.k.shape[2], gate, topk, row, layers, times))
        yield Report(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            versions=versions(),
            inputs=_inputs(longest),
            layers=list(measured),
            dense_forward_ms=dense[0],
            dense_both_ms=dense[1],
            choices=list(choices),
        )


def _grid(
    length: int, block_sizes: Sequence[int], gate_block_sizes: Sequence[int], topks: Sequence[int]
) -> dict[tuple[int, int | None], list[int]]:
    """Returns the topks that do not select all keys for each pair of block and sub-block sizes."""
    for part in gate_block_sizes:
        check_positive("gate_block_sizes", part, "pass numbers of keys in a sub-block")
        if not any(part < size and size % part == 0 for size in block_sizes):
            raise ValueError(
                f"gate_block_sizes must divide larger block_sizes, got {part} and block_sizes "
                f"{tuple(block_sizes)}; pass a divisor of one of them"
            )
    parts: list[int | None] = [None, *sorted(set(gate_block_sizes))]
    grid: dict[tuple[int, int | None], list[int]] = {
        (size, part): kept
        for size in sorted(set(block_sizes))
        if (kept := [topk for topk in sorted(set(topks)) if topk < ceil_div(length, max(1, size))])
        for part in parts
        if part is None or (part < size and size % part == 0)
    }
    if not grid:
        raise ValueError(
            f"block_sizes {tuple(block_sizes)} with topks {tuple(topks)} select all of {length} "
            "keys; use smaller blocks, a smaller topk or a longer sequence"
        )
    return grid


def _qualities(
    samples: Iterable[Call],
    grid: Mapping[Gate, Sequence[int]],
    topks: Sequence[int],
    device: torch.device,
) -> dict[str, list[dict[Gate, Quality]]]:
    """Returns by layer the quality of each gate in each call."""
    measured: dict[str, list[dict[Gate, Quality]]] = {}
    heads: dict[str, int] = {}
    for call in samples:
        q, k = call.q.to(device), call.k.to(device)
        quality = gate_qualities(
            q, k, tuple(grid), topks, positions=call.positions, scale=call.scale
        )
        if not all(x.mass.isfinite().all() for x in quality.values()):
            raise ValueError(
                f"q or k of {call.name or 'a call'} contain NaN or inf; check the model"
            )
        heads.setdefault(call.name, call.q.shape[1])
        if call.q.shape[1] != heads[call.name]:
            raise ValueError(
                "calls of one layer must have the same number of query heads, got "
                f"{heads[call.name]} and {call.q.shape[1]} for {call.name!r}; pass a `Call` with "
                "the name of its layer"
            )
        measured.setdefault(call.name, []).append(quality)
    return measured


def _choice(
    length: int,
    gate: Gate,
    topk: int,
    row: int,
    layers: list[list[Quality]],
    times: tuple[float | None, float | None],
) -> Choice:
    """Returns the choice of one gate and topk; ``row`` is the row of topk in a `Quality`."""
    qualities = [x for batches in layers for x in batches]
    return Choice(
        **gate._asdict(),
        topk=topk,
        sparsity=_sparsity(length, gate.block_size, topk),
        mass=float(torch.cat([x.mass[row] for x in qualities]).mean()),
        best_mass=float(torch.cat([x.best_mass[row] for x in qualities]).mean()),
        found=_mean([x.found[row] for x in qualities]),
        snr=_mean([x.snr for x in qualities]),
        required_snr=required_snr(ceil_div(length, gate.block_size), topk),
        forward_ms=times[0],
        both_ms=times[1],
        heads=[torch.stack([x.mass[row] for x in batches]).mean(0).tolist() for batches in layers],
    )


def _name(gate: Gate, topk: int) -> str:
    part = f", gate_block_size={gate.gate_block_size}" if gate.gate_block_size else ""
    return f"block_size={gate.block_size}, topk={topk}{part}"


def sampled(q: Tensor, k: Tensor, queries: int, name: str = "") -> Call:
    """Returns a call of causal self-attention with a sample of its queries."""
    check_queries_and_keys(q, k)
    index = sample_positions(q.shape[2], queries)
    sample = q[:, :, index.to(q.device)]
    return Call(name, sample, k, index + k.shape[2] - q.shape[2], q.shape[-1] ** -0.5)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _inputs(call: Call) -> str:
    batch, kv_heads, length, head_dim = call.k.shape
    dtype = str(call.k.dtype).removeprefix("torch.")
    heads = f"{call.q.shape[1]}/{kv_heads}"
    return f"batch {batch}, heads {heads}, length {length}, head dim {head_dim}, {dtype}"


def _sparsity(length: int, block_size: int, topk: int) -> float:
    """Returns the share of the query-key pairs of causal attention that are not computed."""
    position = torch.arange(length)
    own = position // block_size
    read = position % block_size + 1 + own.clamp(max=topk - 1) * block_size
    return 1 - int(read.sum()) / (length * (length + 1) // 2)


def _mean(values: list[Tensor]) -> float | None:
    mean = float(torch.cat(values).nanmean())
    return mean if math.isfinite(mean) else None


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


class _Timer:
    """A timer of attention at one shape, forward and, on request, forward and backward."""

    def __init__(self, call: Call, device: torch.device, *, backward: bool) -> None:
        k, heads = call.k, call.q.shape[1]
        shape = (k.shape[0], heads, *k.shape[2:])
        generator = torch.Generator(device).manual_seed(0)
        self.q, self.k, self.v, self.grad = (
            torch.randn(x, generator=generator, device=device, dtype=k.dtype)
            for x in (shape, k.shape, k.shape, shape)
        )
        self.device, self.backward = device, backward

    def __call__(self, attend: Callable[..., Any]) -> tuple[float, float | None]:
        with torch.no_grad():
            forward = median_ms(lambda: attend(self.q, self.k, self.v), self.device)
        if not self.backward:
            return forward, None
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]

        def both() -> None:
            torch.autograd.grad(attend(*inputs), inputs, self.grad)

        with torch.enable_grad():
            return forward, median_ms(both, self.device)
