"""How long a call takes, and from which length on one is faster than another."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def median_ms(function: Callable[[], Any], device: torch.device, *, seconds: float = 0.3) -> float:
    """Median milliseconds of a call: of three at least, and of more while time is left.

    A first call, which may compile, is not counted. Of calls that take seconds, one must do.

    Args:
        function: What is timed.
        device: Where it runs; on CUDA the device's clock is read.
        seconds: How long to go on, at about.
    """
    began = time.perf_counter()
    _once(function, device)
    once = _once(function, device)
    least = 1 if once > 2000 else 3
    times = [once] if least == 1 else []
    while len(times) < least or (time.perf_counter() - began < seconds and len(times) < 100):
        times.append(_once(function, device))
    return statistics.median(times)


def pays_from(times: Sequence[tuple[int, float, float]]) -> int | None:
    """The length from which on the first time is below the second, of those measured, or None.

    Args:
        times: ``(length, time, time)`` of each measurement.
    """
    slow = max((length for length, ours, other in times if ours >= other), default=-1)
    return min((length for length, _, _ in times if length > slow), default=None)


def _once(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3
