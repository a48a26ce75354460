"""Measures how context parallelism scales with the number of GPUs.

Process 0 measures flex_moba with all tokens, then 2, 4, ... processes measure
flexmoba.distributed.context_parallel_moba with each exchange, all in one run:

  strong scaling   the same tokens on more GPUs
  weak scaling     the same tokens per GPU

A result has the milliseconds of a forward call and of a forward with backward: the median over
--repeats calls after --warm calls on each rank, the largest of all ranks. "compute" is the time of
the same attention on each rank without communication, for inputs that already lie there. "exposed"
is the share of the time that is not compute: communication that no computation hides, and copies.
"imbalance" is the share by which the longest compute exceeds the mean of all ranks.
"link" is the rate at which a rank receives in an all-to-all of the size of its keys and values.

"modeled" is the time of the cost model of flexmoba.distributed. Its rates come from process 0, from
the link, and from the exposed times of "gather". A second table has modeled times on more ranks.

The program compares sampled outputs of every measurement with those of process 0 alone.

toy size, one process on a CPU, some seconds:
  python examples/scaling.py --device cpu --length 4096 --heads 4 --kv-heads 2 --head-dim 32 \\
      --block-size 128 --topk 3

full size, one GPU, a context of 1M tokens:
  python examples/scaling.py --json scaling.json

On several GPUs put torchrun in place of python:
  torchrun --nproc-per-node 2 examples/scaling.py --json scaling.json
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmoba import flex_moba
from flexmoba.distributed import Machine, SpreadCall, context_parallel_moba, estimate
from flexmoba.reporting import add_device, add_json, positive, table, versions, write_json

SAMPLED = 64  # queries of each rank whose outputs are compared


class Shard:
    """The tokens of this rank: random q, k and v.

    Args:
        o: The options of the program.
        mesh: The ranks; None for one process without communication.
        length: Tokens of all ranks.
    """

    def __init__(self, o: argparse.Namespace, mesh: DeviceMesh | None, length: int) -> None:
        self.o, self.mesh, self.length = o, mesh, length
        self.rank, self.ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        self.tokens = length // self.ranks
        start = self.rank * self.tokens
        self.q, self.k, self.v = (
            self.normal(seed, heads, start, start + self.tokens)
            for seed, heads in enumerate((o.heads, o.kv_heads, o.kv_heads))
        )

    def normal(self, seed: int, heads: int, start: int, end: int) -> Tensor:
        """Draws tokens ``start`` to ``end`` of a tensor that is the same for any ranks."""
        o, piece = self.o, self.length // self.o.most
        x = torch.empty(1, heads, end - start, o.head_dim, device=o.device, dtype=o.dtype)
        for first in range(start, end, piece):
            generator = torch.Generator(o.device).manual_seed(4 * first + seed)
            shape = (1, heads, piece, o.head_dim)
            drawn = torch.randn(shape, device=o.device, dtype=o.dtype, generator=generator)
            x[:, :, first - start : first - start + piece] = drawn
        return x

    def attend(self, exchange: str) -> Any:
        """Attends from this rank's queries."""
        o, mesh = self.o, self.mesh
        if mesh is None:
            return flex_moba(self.q, self.k, self.v, o.block_size, o.topk)
        lengths = [self.tokens] * self.ranks
        options: dict[str, Any] = {"mesh": mesh, "exchange": exchange, "lengths": lengths}
        return context_parallel_moba(self.q, self.k, self.v, o.block_size, o.topk, **options)

    def without_communication(self, exchange: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k and v of the attention that this rank computes."""
        o, kv_heads = self.o, self.o.kv_heads
        if exchange == "gather":
            end = (self.rank + 1) * self.tokens
            return self.q, self.normal(1, kv_heads, 0, end), self.normal(2, kv_heads, 0, end)
        heads, kv_heads = o.heads // self.ranks, max(1, kv_heads // self.ranks)
        q, k, v = (
            self.normal(i, n, 0, self.length) for i, n in enumerate((heads, *[kv_heads] * 2))
        )
        return q, k, v

    def times(
        self, attend: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> dict[str, Any]:
        """Measures a forward call, and a forward with backward."""
        with torch.no_grad():
            found = self.time(attend, "forward")
        if self.o.backward:
            inputs, grad = [x.requires_grad_() for x in (q, k, v)], torch.randn_like(q)
            found |= self.time(lambda: torch.autograd.grad(attend(), inputs, grad), "both")
            for x in inputs:
                x.requires_grad_(False)
        return found

    def time(self, call: Callable[[], Any], name: str) -> dict[str, Any]:
        """Returns median milliseconds of a call, most and mean of all ranks, and peak MiB."""
        o, cuda = self.o, self.o.device_type == "cuda"
        for _ in range(o.warm):
            call()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(o.repeats):
            self.largest(0.0)  # waits for the other ranks
            began = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            taken.append((time.perf_counter() - began) * 1e3)
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
        ms = statistics.median(taken)
        most, peak = self.largest(ms, peak)
        (total,) = self.reduced(dist.ReduceOp.SUM, ms)
        found = {f"{name}_ms": most, f"{name}_mean_ms": total / self.ranks}
        return found | {f"{name}_MiB": peak if cuda else None}

    def largest(self, *values: float) -> list[float]:
        """Returns the largest values of all ranks."""
        return self.reduced(dist.ReduceOp.MAX, *values)

    def reduced(self, operation: Any, *values: float) -> list[float]:
        """Returns the values of all ranks, reduced to one."""
        found = torch.tensor(values, dtype=torch.float64, device=self.o.device)
        if self.mesh is not None:
            dist.all_reduce(found, operation, self.mesh.get_group())
        result: list[float] = found.tolist()
        return result

    def sampled(self, out: Tensor) -> Tensor:
        """Returns outputs of some tokens of every rank of the largest mesh, in their order."""
        of_piece = self.length // self.o.most
        step = max(1, of_piece // SAMPLED)
        mine = out.detach()[:, :, ::step].contiguous()
        if self.mesh is None:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine, self.mesh.get_group())
        return torch.cat(parts, 2)

    def link_gb_per_s(self) -> float:
        """Returns the gigabytes per second that a rank receives in an all-to-all of its keys."""
        assert self.mesh is not None
        sent = torch.cat([self.k.flatten(), self.v.flatten()])
        sent = sent[: len(sent) // self.ranks * self.ranks]
        received, group = torch.empty_like(sent), self.mesh.get_group()
        found = self.time(lambda: dist.all_to_all_single(received, sent, group=group), "link")
        others = sent.numel() * sent.element_size() * (self.ranks - 1) / self.ranks
        return float(others / found["link_ms"] / 1e6)


def exchanges_of(o: argparse.Namespace, ranks: int) -> list[str]:
    """Returns the exchanges that these ranks can make."""
    if ranks == 1:
        return ["none"]
    fits = o.kv_heads % ranks == 0 or (ranks % o.kv_heads == 0 and o.heads % ranks == 0)
    return [x for x in o.exchange if x == "gather" or fits]


def measure(
    o: argparse.Namespace,
    mesh: DeviceMesh | None,
    length: int,
    exchange: str,
    expected: dict[int, Tensor],
) -> dict[str, Any]:
    """Measures an exchange of one length on the ranks of a mesh."""
    shard = Shard(o, mesh, length)
    found: dict[str, Any] = {"ranks": shard.ranks, "length": length, "exchange": exchange}

    def attend() -> Any:
        return shard.attend(exchange)

    with torch.no_grad():
        sampled = shard.sampled(attend())
    if mesh is None:
        expected[length] = sampled
    elif length in expected:  # on process 0
        difference = (sampled - expected[length]).abs().max() / sampled.abs().max()
        found["difference"] = float(difference)
    found |= shard.times(attend, shard.q, shard.k, shard.v)
    if mesh is not None:
        found["link_GB_per_s"] = shard.link_gb_per_s()
    if mesh is not None and o.compute:
        q, k, v = shard.without_communication(exchange)
        alone = shard.times(lambda: flex_moba(q, k, v, o.block_size, o.topk), q, k, v)
        found |= {f"compute_{name}": x for name, x in alone.items() if name.endswith("ms")}
    return found


def measure_all(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one process, then more and more of them."""
    results: list[dict[str, Any]] = []
    expected: dict[int, Tensor] = {}
    for ranks in o.ranks:
        weak = o.length * ranks // o.most
        mesh = None if ranks == 1 else DeviceMesh(o.device_type, list(range(ranks)))
        if dist.get_rank() < ranks:
            cases = product(dict.fromkeys((o.length, weak)), exchanges_of(o, ranks))
            for length, exchange in cases:
                try:
                    found = measure(o, mesh, length, exchange, expected)
                except torch.OutOfMemoryError:
                    if mesh is not None:  # the other ranks wait for this one
                        raise
                    found = {"ranks": 1, "length": length, "error": "out of memory"}
                results.append(found)
                if dist.get_rank() == 0:
                    print(found, file=sys.stderr, flush=True)
                    if o.json not in (None, "-"):  # in case the process is killed
                        write_json(report_of(results, o), o.json)
        dist.barrier()
    return results


def compare(results: list[dict[str, Any]], o: argparse.Namespace) -> None:
    """Adds speed-ups over one process, efficiencies and exposed shares to the results."""
    for kind in ("forward_ms", "both_ms"):
        alone = {x["length"]: x[kind] for x in results if x["ranks"] == 1 and kind in x}
        for x in results:
            if kind not in x or x["ranks"] == 1:
                continue
            name = kind.removesuffix("_ms")
            if x["length"] in alone:
                x[f"{name}_speedup"] = alone[x["length"]] / x[kind]
            if x["length"] // x["ranks"] in alone:
                x[f"{name}_weak"] = alone[x["length"] // x["ranks"]] / x[kind]
            if f"compute_{kind}" in x:
                x[f"{name}_exposed"] = 1 - x[f"compute_{kind}"] / x[kind]
                x[f"{name}_imbalance"] = x[f"compute_{kind}"] / x[f"compute_{name}_mean_ms"] - 1


def machine_of(results: list[dict[str, Any]], o: argparse.Namespace) -> Machine | None:
    """Returns the rates that these results have; None without one process and several."""
    alone = [x for x in results if x["ranks"] == 1 and "forward_ms" in x]
    links = [x["link_GB_per_s"] * 1e9 for x in results if "link_GB_per_s" in x]
    if not alone or not links:
        return None
    longest = max(alone, key=lambda x: int(x["length"]))
    call, unit = call_of(o, longest["length"]), Machine(1, 1, math.inf, math.inf, 1)
    forward = estimate(call, 1, unit, "gather").compute
    both = estimate(call, 1, unit, "gather", backward=True).compute
    seconds = longest["forward_ms"] / 1e3
    forward_flops = backward_flops = forward / seconds
    if o.backward:
        backward_flops = (both - forward) / (longest["both_ms"] / 1e3 - seconds)
    link, network = statistics.median(links), o.network or math.inf
    machine = Machine(forward_flops, backward_flops, link, network * 1e9, o.ranks_per_node)
    return with_exposed_rates(machine, results, o)


def with_exposed_rates(
    machine: Machine, results: list[dict[str, Any]], o: argparse.Namespace
) -> Machine:
    """Returns the machine with the rates that explain the exposed times of "gather" best.

    They are the least squares of the exposed seconds of each forward and each backward pass.
    """
    rows, seconds = [], []
    slow = machine._replace(arrange=1.0)  # copies take as many seconds as they have bytes
    for x in results:
        if x.get("exchange") != "gather" or "compute_forward_ms" not in x:
            continue

        def modeled(machine: Machine, backward: bool, x: dict[str, Any] = x) -> float:
            call = call_of(o, x["length"])
            cost = estimate(call, x["ranks"], machine, "gather", backward=backward)
            return cost.total - cost.compute

        forward = modeled(machine, False)
        copied = modeled(slow, False) - forward
        exposed = (x["forward_ms"] - x["compute_forward_ms"]) / 1e3
        rows.append([copied, 0.0])
        seconds.append(exposed - forward)
        if "both_ms" in x:
            compute = (x["compute_both_ms"] - x["compute_forward_ms"]) / 1e3
            rows.append([copied, compute])
            of_both = (x["both_ms"] - x["compute_both_ms"]) / 1e3
            seconds.append(of_both - exposed - (modeled(machine, True) - forward))
    if not rows:
        return machine
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (rows, seconds))
    scale = a.abs().amax(0).clamp(min=1e-30)  # bytes and seconds differ by many orders
    per_byte, overhead = (torch.linalg.pinv(a / scale) @ b / scale).clamp(min=0).tolist()
    return machine._replace(
        arrange=1 / per_byte if per_byte > 0 else math.inf, chunk_overhead=overhead
    )


def call_of(o: argparse.Namespace, length: int) -> SpreadCall:
    """Returns the call that the cost model counts."""
    sizes = (o.heads, o.kv_heads, length, o.block_size, o.topk, o.head_dim)
    return SpreadCall(*sizes, o.dtype.itemsize)


def predict(results: list[dict[str, Any]], machine: Machine, o: argparse.Namespace) -> None:
    """Adds the times of the cost model to the results of several processes."""
    for x in results:
        if x["ranks"] > 1:
            for name, backward in (("forward_ms", False), ("both_ms", True)):
                if name in x:
                    call = call_of(o, x["length"])
                    found = estimate(call, x["ranks"], machine, x["exchange"], backward=backward)
                    x[f"modeled_{name}"] = found.total * 1e3


def predictions(machine: Machine, o: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns modeled times for up to 1,024 ranks, as many as a node has without --network."""
    rows, most = [], 1024 if o.network else o.ranks_per_node
    for ranks in (2**i for i in range(1, 11)):
        if ranks > most or o.length % ranks:
            continue
        for exchange in exchanges_of(o, ranks):
            call = call_of(o, o.length)
            options: dict[str, Any] = {"backward": o.backward}
            found = estimate(call, ranks, machine, exchange, **options)  # type: ignore[arg-type]
            alone = estimate(call, 1, machine, "gather", **options)
            rows.append(
                {"ranks": ranks, "exchange": exchange, "modeled_ms": found.total * 1e3}
                | {"speedup": alone.total / found.total, "exposed": found.exposed}
            )
    return rows


def report_of(results: list[dict[str, Any]], o: argparse.Namespace) -> dict[str, Any]:
    """Returns the results with comparisons, the rates, modeled times, and the circumstances."""
    compare(results, o)
    device = torch.cuda.get_device_name() if o.device_type == "cuda" else "cpu"
    report: dict[str, Any] = {"device": device, "processes": dist.get_world_size(), **versions()}
    report["options"] = {name: str(x) for name, x in vars(o).items() if name != "json"}
    machine = machine_of(results, o)
    if machine is not None:
        predict(results, machine, o)
        rates = {name: x for name, x in machine._asdict().items() if math.isfinite(x)}
        report |= {"machine": rates, "modeled": predictions(machine, o)}
    return report | {"results": results}


def tables_of(report: dict[str, Any]) -> str:
    """Returns the tables of a report."""
    tables = shown(report["results"])
    if report.get("modeled"):
        tables += "\n\nCost model with the rates of this run:\n\n" + shown(report["modeled"])
    return tables


COLUMNS = ["ranks", "length", "exchange", "forward_ms", "both_ms", "both_MiB", "both_speedup"]
COLUMNS += ["both_weak", "both_exposed", "both_imbalance", "modeled_both_ms", "modeled_ms"]
COLUMNS += ["speedup", "exposed", "link_GB_per_s", "difference", "error"]


def shown(results: list[dict[str, Any]]) -> str:
    """Returns a table of results."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if value < 10 else f"{value:.0f}"
        return "" if value is None else str(value)

    names = [name for name in COLUMNS if any(x.get(name) is not None for x in results)]
    return table(names, [[cell(x.get(name)) for name in names] for x in results])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = {"length": 2**20, "heads": 32, "kv-heads": 8, "head-dim": 128}
    sizes |= {"block-size": 4096, "topk": 12, "warm": 1, "repeats": 3}
    for name, size in sizes.items():
        add(f"--{name}", type=positive, default=size, help=f"default {size}")
    add("--exchange", nargs="+", choices=["gather", "heads"], default=["gather", "heads"])
    add("--ranks", type=positive, nargs="+", metavar="N", help="numbers of processes to measure, "
        "powers of two (default: all up to the number of processes)")  # fmt: skip
    add("--forward", dest="backward", action="store_false", help="omit the backward pass")
    add("--no-compute", dest="compute", action="store_false", help="measure no compute")
    add("--ranks-per-node", type=positive, default=8, help="of the modeled machine (%(default)s)")
    add("--network", type=float, help="gigabytes per second that a GPU receives from other nodes, "
        "an assumption of the model; without it, the model ends with a node")  # fmt: skip
    add_device(parser)
    add_json(parser)
    o = parser.parse_args(argv)
    o.device_type = torch.device(o.device).type
    o.dtype = torch.bfloat16 if o.device_type == "cuda" else torch.float32
    return o


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    o = parse(argv)
    if o.device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if o.device_type == "cuda" else "gloo"
    if "RANK" in os.environ:  # torchrun describes the group
        dist.init_process_group(backend, timeout=timedelta(minutes=3))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        processes = dist.get_world_size()
        o.most = 2 ** (processes.bit_length() - 1)  # ranks are powers of two
        if o.length % o.most**2:
            sys.exit(f"--length {o.length} must be a multiple of {o.most**2}")
        powers = [2**i for i in range(o.most.bit_length())]
        o.ranks = sorted({*(o.ranks or powers)})
        if wrong := {*o.ranks} - {*powers}:
            sys.exit(f"--ranks {min(wrong)} must be one of {', '.join(map(str, powers))}")
        results = measure_all(o)
        if dist.get_rank() == 0:
            report = report_of(results, o)
            if write_json(report, o.json):
                print(tables_of(report))
    finally:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
