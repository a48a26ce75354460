"""Fills the tables of docs/distributed.md: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Measured tables come from the JSON
files in docs/scaling/, which `examples/scaling.py --json` writes. Modeled tables come from
`flexmoba.distributed.estimate`, with the rates of these runs.
"""

import functools
import json
import math
import re
import runpy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexmoba.bench.configs import size
from flexmoba.distributed import Machine, SpreadCall, estimate
from flexmoba.distributed.cost import Cost

DOCS = Path(__file__).parent
PAGE = DOCS / "distributed.md"
SCALING = runpy.run_path(str(DOCS.parent / "examples" / "scaling.py"))
RUNS = ("h200-x2", "h200-x4", "h200-x8")
SELECTED = DOCS / "scaling" / "selected-blocks-smollm2-8k.json"
NETWORK = 5e10  # bytes per second, an assumption: InfiniBand of 400 Gbit/s for each GPU
CALL = SpreadCall(heads=32, kv_heads=8, length=2**20, block_size=4096, topk=12)
MOST_HEADS = 32  # ranks that "heads" supports


def table(names: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(name: str) -> dict[str, Any]:
    """Returns a report of docs/scaling/."""
    report: dict[str, Any] = json.loads((DOCS / "scaling" / f"{name}.json").read_text())
    return report


def has(name: str) -> bool:
    """Returns whether docs/scaling/ has a report."""
    return (DOCS / "scaling" / f"{name}.json").is_file()


def options_of(report: dict[str, Any]) -> Namespace:
    """Returns the options of a run of `examples/scaling.py` that its model needs."""
    names = ("heads", "kv_heads", "head_dim", "block_size", "topk")
    sizes = {name: int(report["options"][name]) for name in names}
    return Namespace(**sizes, dtype=torch.bfloat16, backward=True, network=None, ranks_per_node=8)


@functools.cache
def machine() -> Machine:
    """Returns the rates that fit all measured runs, with the assumed network."""
    reports = [read(name) for name in RUNS if has(name)]
    results = [x for report in reports for x in report["results"]]
    found: Machine = SCALING["machine_of"](results, options_of(reports[0]))
    return found._replace(network=NETWORK)


def fetched(call: SpreadCall, ranks: int) -> float:
    """Returns the share of the blocks before the last rank that its queries select.

    The number of selected blocks, as a multiple of those of one query, grows by as much with each
    doubling of the queries as from 64 to 1,024 queries of the measured model.
    """
    results = json.loads(SELECTED.read_text())["results"]
    few, many = (
        x["blocks"] / (x["topk"] - 1)
        for x in results
        if x["block_size"] == 32 and x["queries"] in (64, 1024)
    )
    ratio = few + (many - few) / 4 * math.log2(call.length / ranks / 64)
    before = call.length / call.block_size * (1 - 1 / ranks)
    assert call.topk is not None
    return min(1.0, ratio * (call.topk - 1) / before)


def exchanges() -> str:
    """Returns modeled times of 8 to 1,024 GPUs, the fastest of each network in bold."""
    rows = []
    for ranks in (2**i for i in range(3, 11)):
        row = [
            f"{ranks:,}",
            f"{ms(estimate(CALL, ranks, machine(), 'gather', backward=True).compute)}",
        ]
        for per_node, names in (
            (1024, ("gather", "heads")),
            (8, ("gather", "heads", "blocks", ("gather", "heads"))),
        ):
            network = machine()._replace(ranks_per_node=per_node)
            share = fetched(CALL, ranks)
            costs = [
                estimate(CALL, ranks, network, name, backward=True, fetched=share)
                if name != "heads" or ranks <= MOST_HEADS
                else None
                for name in names
            ]
            least = min(x.total for x in costs if x is not None)
            for cost in costs:
                cell = "" if cost is None else f"{ms(cost.total)} ({cost.exposed:.0%})"
                row.append(f"**{cell}**" if cost is not None and cost.total == least else cell)
        rows.append(row)
    names = ["GPUs", "compute", "NVLink: gather", "heads"]
    return table([*names, "InfiniBand: gather", "heads", "blocks", "gather and heads"], rows)


def selected() -> str:
    """Returns the measured shares of the blocks that stretches of queries select."""
    results = json.loads(SELECTED.read_text())["results"]
    settings = list(dict.fromkeys((x["block_size"], x["topk"]) for x in results))
    cells = {(x["block_size"], x["topk"], x["queries"]): x for x in results}
    rows = []
    for queries in dict.fromkeys(x["queries"] for x in results):
        row = [f"{queries:,}"]
        for setting in settings:
            x = cells.get((*setting, queries))
            ratio = x and x["blocks"] / (x["topk"] - 1)
            row.append(f"{x['share']:.0%} ({ratio:.1f} x)" if x else "")
        rows.append(row)
    return table(["queries", *(f"block {a}, topk {b}" for a, b in settings)], rows)


def blocks() -> str:
    """Returns modeled times of the exchange by blocks, beside the exchange by gathering."""
    rows = []
    for block_size, topk in ((4096, 12), (512, 8)):
        call = CALL._replace(block_size=block_size, topk=topk)
        for ranks in (8, 64, 256, 1024):
            share = fetched(call, ranks)
            options: dict[str, Any] = {"backward": True, "fetched": share}
            costs = [estimate(call, ranks, machine(), x, **options) for x in ("gather", "blocks")]
            rows.append(
                [f"{block_size}, {topk}", f"{ranks:,}", f"{share:.0%}", ms(costs[0].compute)]
                + [f"{ms(x.total)} ({x.exposed:.0%})" for x in costs]
            )
    return table(["block, topk", "GPUs", "blocks fetched", "compute", "gather", "blocks"], rows)


def rates() -> str:
    """Returns the rates of the measured runs."""
    m = machine()
    rows = [
        ["`forward_flops`", f"{m.forward_flops / 1e12:.0f} TFLOP/s"],
        ["`backward_flops`", f"{m.backward_flops / 1e12:.0f} TFLOP/s"],
        ["`link`", f"{m.link / 1e9:.0f} GB/s"],
        ["`arrange`", f"{m.arrange / 1e9:.0f} GB/s"],
        ["`chunk_overhead`", f"{m.chunk_overhead:.1%}"],
        ["`network`", f"{m.network / 1e9:.0f} GB/s (assumed)"],
    ]
    return table(["rate", "value"], rows)


def scaling() -> str:
    """Returns the measured results, a table for each number of GPUs."""
    runs = [[x for x in (name, f"{name}-4m") if has(x)] for name in RUNS]
    return "\n\n".join(f"{measured(*map(read, x))}\n\n{sources(x)}" for x in runs if x)


def sources(names: list[str]) -> str:
    """Returns links to reports of docs/scaling/."""
    return f"Raw results: {', '.join(f'[`{x}.json`](scaling/{x}.json)' for x in names)}."


def modeled(report: dict[str, Any], x: dict[str, Any]) -> Cost:
    """Returns the modeled cost of a result: with backward if that is measured."""
    call = SCALING["call_of"](options_of(report), x["length"])
    backward = "both_ms" in x
    return estimate(call, x["ranks"], machine(), x["exchange"], backward=backward)


def measured(*reports: dict[str, Any]) -> str:
    """Returns the results of runs of `examples/scaling.py` on the same GPUs."""
    rows = []
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "GPUs": lambda x: str(x["ranks"]),
        "tokens": lambda x: size(x["length"]),
        "exchange": lambda x: x["error"] if "error" in x else x["exchange"] * (x["ranks"] > 1),
        "forward ms": lambda x: f"{x['forward_ms']:,.0f}",
        "with backward ms": lambda x: f"{x['both_ms']:,.0f}",
        "speed-up": lambda x: f"{x['both_speedup']:.2f}",
        "weak": lambda x: f"{x.get('both_weak') or x['forward_weak']:.2f}",
        "exposed": lambda x: f"{x['both_exposed']:.1%}",
        "imbalance": lambda x: f"{x['both_imbalance']:.1%}",
        "peak GiB": lambda x: f"{(x.get('both_MiB') or x['forward_MiB']) / 1024:.1f}",
        "modeled": lambda x: f"{ms(x['modeled'].total)} ({x['modeled'].exposed:.1%})",
    }
    results = [
        x | ({"modeled": modeled(report, x)} if x["ranks"] > 1 else {})
        for report in reports
        for x in report["results"]
    ]
    for x in results:
        row = []
        for column in columns.values():
            try:
                row.append(column(x))
            except KeyError:  # not measured
                row.append("")
        rows.append(row)
    first = reports[0]
    o, links = first["options"], [x["link_GB_per_s"] for x in results if "link_GB_per_s" in x]
    about = (
        f"{first['processes']} {first['device']} of one host, torch {first['torch']}, Triton "
        f"{first['triton']}, flexmoba {first['commit'][:7]}, {first['date']}; {o['heads']} query "
        f"heads, {o['kv_heads']} KV heads, head dim {o['head_dim']}, block {o['block_size']}, "
        f"topk {o['topk']}, bfloat16; a rank receives {min(links):.0f} to {max(links):.0f} GB/s."
    )
    return f"{about}\n\n{table(list(columns), rows)}"


def training() -> str:
    """Returns the measured training steps, and the first steps of runs that had no other."""
    names = [f"{name}-training" for name in RUNS if has(f"{name}-training")]
    reports, links = [read(name) for name in names], sources(names)
    rows, more = [], ""
    for x in reports:
        o = x["options"]
        gpus, tokens, peak = o["context_parallel"], size(o["length"]), x["peak_MiB"] / 1024
        if "step_ms" in x:
            row = [f"{x['parameters'] / 1e9:.2f}B", str(gpus), tokens]
            row += [f"{o['block_size']}, {o['topk']}", f"{x['step_ms'] / 1e3:.1f}"]
            rows.append([*row, f"{x['tokens_per_second']:,.0f}", f"{peak:.1f}"])
        else:
            (first,) = x["history"]["times"]
            more += (
                f"\n\nA run with {tokens} tokens on {gpus} GPUs made only its first step, which "
                f"compiles: {first[2]:.0f} s, with a peak of {peak:.1f} GiB on a GPU."
            )
    columns = ["parameters", "GPUs", "tokens", "block, topk", "seconds of a step", "tokens/s"]
    x = reports[0]
    about = (
        f"One context of random bytes on {x['device']}, torch {x['versions']['torch']}, bfloat16 "
        f"autocast, {x['options']['layers']} layers of width {x['options']['dim']}, with "
        '`--fsdp --recompute` and `exchange="gather"`:'
    )
    return f"{about}\n\n{table([*columns, 'peak GiB of a GPU'], rows)}{more}\n\n{links}"


def ms(seconds: float) -> str:
    """Returns milliseconds with two or more digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "exchanges": exchanges,
    "selected": selected,
    "blocks": blocks,
    "rates": rates,
    "scaling": scaling,
    "training": training,
}


def filled(page: str) -> str:
    """Returns a page with its tables."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
