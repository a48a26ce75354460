"""Times a call, and finds the length from which one call is faster than another."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_SERIES_MS, _MOST_CALLS = 20.0, 100


def median_ms(function: Callable[[], Any], device: torch.device, *, seconds: float = 0.3) -> float:
    """Returns the median milliseconds of a call in a series of calls.

    On CUDA, the calls of a series of about 20 ms queue one after another, as the calls of a model
    do. So the time is that of the GPU, or that of the host if the host takes longer. The median is
    over at least three series. The first run, which may compile, does not count. A call of more
    than two seconds runs once.

    Args:
        function: The call.
        device: Its device. On CUDA, events measure the time.
        seconds: Approximate duration of the measurement.
    """
    began = time.perf_counter()
    _mean_ms(function, device, 1)
    once = _mean_ms(function, device, 1)
    if once > 2000:
        return once
    calls = 1
    if device.type == "cuda":
        calls = max(1, min(_MOST_CALLS, round(_SERIES_MS / max(once, 1e-3))))
    return _median(function, device, calls, seconds - (time.perf_counter() - began), least=3)


def median_ms_alone(
    function: Callable[[], Any], device: torch.device, *, seconds: float = 0.1
) -> float:
    """Returns the median milliseconds of a call that begins while the device is idle.

    The device then waits for the host to check the arguments and to launch the first kernel.

    Args:
        function: The call, which has run before.
        device: Its device. On CUDA, events measure the time.
        seconds: Approximate duration of the measurement.
    """
    return _median(function, device, 1, seconds, least=1)


def faster_from(times: Sequence[tuple[int, float, float]]) -> int | None:
    """Returns the shortest measured length from which the first time is always the lower one.

    Args:
        times: ``(length, first time, second time)`` of each measurement.

    Returns:
        The length, or None if the first time is not lower at the greatest length.
    """
    slow = max((length for length, ours, other in times if ours >= other), default=-1)
    return min((length for length, _, _ in times if length > slow), default=None)


def _median(
    function: Callable[[], Any], device: torch.device, calls: int, seconds: float, *, least: int
) -> float:
    end = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < least or (time.perf_counter() < end and len(times) < 100):
        times.append(_mean_ms(function, device, calls))
    return statistics.median(times)


def _mean_ms(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Returns the mean milliseconds of calls in a row, which begin on an idle device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) * 1e3 / calls
