"""Times a call, and finds the length from which one call is faster than another."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def median_ms(function: Callable[[], Any], device: torch.device, *, seconds: float = 0.3) -> float:
    """Returns the median milliseconds of a call, over at least three runs.

    The first run, which may compile, does not count. A call of more than two seconds runs once.

    Args:
        function: The call.
        device: Its device. On CUDA, events measure the time.
        seconds: Approximate duration of the measurement.
    """
    began = time.perf_counter()
    _once(function, device)
    once = _once(function, device)
    least = 1 if once > 2000 else 3
    times = [once] if least == 1 else []
    while len(times) < least or (time.perf_counter() - began < seconds and len(times) < 100):
        times.append(_once(function, device))
    return statistics.median(times)


def faster_from(times: Sequence[tuple[int, float, float]]) -> int | None:
    """Returns the shortest measured length from which the first time is always the lower one.

    Args:
        times: ``(length, first time, second time)`` of each measurement.

    Returns:
        The length, or None if the first time is not lower at the greatest length.
    """
    slow = max((length for length, ours, other in times if ours >= other), default=-1)
    return min((length for length, _, _ in times if length > slow), default=None)


def _once(function: Callable[[], Any], device: torch.device) -> float:
    """Returns the milliseconds of one call."""
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
