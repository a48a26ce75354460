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
RUNS = ("h100-x2", "h100-x4")  # runs of one kind of GPU, which the model is fitted to
LONG_RUNS = ("h200-x2-4m", "h200-x4-4m")
TRAINING = ("h200-x2-training", "h100-x4-training")
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


def options_of(report: dict[str, Any]) -> Namespace:
    """Returns the options of a run of `examples/scaling.py` that its model needs."""
    names = ("heads", "kv_heads", "head_dim", "block_size", "topk")
    sizes = {name: int(report["options"][name]) for name in names}
    return Namespace(**sizes, dtype=torch.bfloat16, backward=True, network=None, ranks_per_node=8)


@functools.cache
def machine() -> Machine:
    """Returns the rates that fit the runs of `RUNS`, with the assumed network."""
    reports = [read(name) for name in RUNS]
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
    """Returns the measured results: one table for each run of `RUNS`, one for the long runs."""
    (sizes,) = {tuple(vars(options_of(read(x))).items()) for x in (*RUNS, *LONG_RUNS)}
    o = Namespace(**dict(sizes))
    about = (
        f"All runs: {o.heads} query heads, {o.kv_heads} KV heads, head dim {o.head_dim}, block "
        f"{o.block_size}, topk {o.topk}, bfloat16."
    )
    runs = [
        f"{measured(list(map(read, names)), is_modeled=names != LONG_RUNS)}\n\n{sources(names)}"
        for names in (*((name,) for name in RUNS), LONG_RUNS)
    ]
    return "\n\n".join([about, *runs])


def sources(names: tuple[str, ...]) -> str:
    """Returns links to reports of docs/scaling/."""
    return f"Raw results: {', '.join(f'[`{x}.json`](scaling/{x}.json)' for x in names)}."


def modeled(report: dict[str, Any], x: dict[str, Any]) -> Cost:
    """Returns the modeled cost of a result: with backward if that is measured."""
    call = SCALING["call_of"](options_of(report), x["length"])
    backward = "both_ms" in x
    return estimate(call, x["ranks"], machine(), x["exchange"], backward=backward)


def measured(reports: list[dict[str, Any]], *, is_modeled: bool) -> str:
    """Returns the results of runs of `examples/scaling.py`, without columns that are empty."""
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
        x | ({"modeled": modeled(report, x)} if is_modeled and x["ranks"] > 1 else {})
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
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    names, rows = ([[row[i] for i in used] for row in x] for x in ([list(columns)], rows))
    first, gpus = reports[0], " and ".join(str(x["processes"]) for x in reports)
    links = [x["link_GB_per_s"] for x in results if "link_GB_per_s" in x]
    about = (
        f"{gpus} {first['device']} of one host, torch {first['torch']}, Triton {first['triton']}, "
        f"flexmoba {first['commit'][:7]}, {first['date']}; a rank receives {min(links):.0f} to "
        f"{max(links):.0f} GB/s."
    )
    return f"{about}\n\n{table(names[0], rows)}"


def training() -> str:
    """Returns the measured training steps."""
    reports, rows = [read(name) for name in TRAINING], []
    for x in reports:
        o = x["options"]
        gpus = o["context_parallel"]
        row = [f"{x['parameters'] / 1e9:.2f}B", f"{gpus} {x['device']}"]
        row += [str(o.get("fsdp_processes") or gpus), size(o["length"])]
        row += [f"{o['block_size']}, {o['topk']}", f"{x['step_ms'] / 1e3:.1f}"]
        rows.append([*row, f"{x['tokens_per_second']:,.0f}", f"{x['peak_MiB'] / 1024:.1f}"])
    columns = ["parameters", "GPUs", "FSDP over", "tokens", "block, topk", "seconds of a step"]
    first = reports[0]
    about = (
        f"One context of random bytes, torch {first['versions']['torch']}, bfloat16 autocast, "
        f"{first['options']['layers']} layers of width {first['options']['dim']}, with `--fsdp "
        '--recompute` and `exchange="gather"`. `--fsdp-processes` is the number of GPUs under '
        "*FSDP over*:"
    )
    lines = table([*columns, "tokens/s", "peak GiB of a GPU"], rows)
    return f"{about}\n\n{lines}\n\n{sources(TRAINING)}"


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
