"""Threads that compute pieces of a call on a CPU, each piece on one thread.

torch divides every operation among threads, and each operation waits for the slowest one. If
another process uses a core, thousands of short operations each wait for it. A piece is a chain of
such operations, so one wait for each piece is enough, and a thread that is late computes fewer
pieces.
"""

import collections
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_pieces(
    function: Callable[[_Item], _Result], items: Iterable[_Item], device: torch.device
) -> Iterator[_Result]:
    """Yields the results of ``function`` for all items, in their order.

    Args:
        function: A function without gradients, which may run in another thread.
        items: The pieces.
        device: The device of the tensors. Only a CPU with several threads gets more than one piece
            at a time.
    """
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        yield from map(function, items)
        return
    pool = _pool(n_threads, os.getpid())
    run = functools.partial(_in_mode, torch.is_inference_mode_enabled(), function)
    running: collections.deque[Future[_Result]] = collections.deque()
    for item in items:
        running.append(pool.submit(run, item))
        if len(running) > 2 * n_threads:  # bounds the results in memory
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _in_mode(inference: bool, function: Callable[[_Item], _Result], item: _Item) -> _Result:
    with torch.inference_mode(inference), torch.no_grad():  # settings of each thread
        return function(item)


@functools.cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Returns threads whose operations run on one thread; a forked process needs its own."""
    started = threading.Barrier(n_threads + 1)

    def use_one_thread() -> None:
        torch.get_num_threads()  # sets this thread's number to the default, now and not later
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(n_threads, "flexmoba", use_one_thread)
    for _ in range(n_threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(n_threads)  # the default of new threads, which the others have changed
    return pool
