"""Processes of one group that run functions for tests. They start once for many calls."""

import datetime
import io
import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SECONDS = 60  # after which a call counts as hanging

Task = Callable[..., Any]


class Processes:
    """Processes 0 to ``size - 1`` of a group. `run` calls a function in each of them."""

    def __init__(self, size: int, folder: Path, device: str = "cpu") -> None:
        context = mp.get_context("forkserver")  # imports torch once for all processes
        context.set_forkserver_preload(["tests.test_context_parallel"])
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, str(folder / f"store{size}"), device, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, task: Task, arguments: list[tuple[Any, ...]], seconds: float = SECONDS) -> list:
        """Calls ``task(mesh, *arguments[rank])`` in each process.

        ``task`` must be importable. Returns the results of all ranks, on CPU. An exception is the
        result of a rank that raised it, and EOFError of a process that ended.
        """
        for pipe, mine in zip(self.pipes, arguments, strict=True):
            pipe.send_bytes(_bytes((task, mine)))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds):
                self.stop()
                raise AssertionError(f"rank {rank} hangs, or waits for another rank")
            try:
                results.append(_value(pipe.recv_bytes()))
            except EOFError as error:  # the process ended
                results.append(error)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _value(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _serve(rank: int, size: int, store: str, device: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    mesh: DeviceMesh = init_device_mesh(device, (size,))
    while True:
        try:
            task, arguments = _value(pipe.recv_bytes())
        except EOFError:
            break
        try:
            result = task(mesh, *arguments)
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = error
        pipe.send_bytes(_bytes(result))
    dist.destroy_process_group()
