"""Fills the tables of docs/distributed.md: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Measured tables come from the JSON
files in docs/scaling/, which `examples/scaling.py --json` writes. Modeled tables come from
`flexmoba.distributed.estimate`, with the rates of a measured run if there is one.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexmoba.bench.configs import size
from flexmoba.distributed import Machine, SpreadCall, estimate

DOCS = Path(__file__).parent
PAGE = DOCS / "distributed.md"
MEASURED = DOCS / "scaling" / "h100-x2.json"
SELECTED = DOCS / "scaling" / "selected-blocks-smollm2-8k.json"
# FLOP/s of one H100: 1M tokens, 4 and 1 heads, block 4096, topk 12 (docs/benchmarks.md). The bytes
# per second are assumptions: NVLink in a node of 8, InfiniBand of 400 Gbit/s for each GPU.
MACHINE = Machine(4.4e14, 3.1e14, link=2e11, network=5e10, ranks_per_node=8)
CALL = SpreadCall(heads=32, kv_heads=8, length=2**20, block_size=4096, topk=12)
MOST_HEADS = 32  # ranks that "heads" supports


def table(names: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine() -> Machine:
    """Returns the rates of the measured run, or the assumed ones."""
    if not MEASURED.is_file():
        return MACHINE
    rates = json.loads(MEASURED.read_text())["machine"]
    names = ("forward_flops", "backward_flops", "link")
    return MACHINE._replace(**{name: rates[name] for name in names})


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
    rates, rows = machine(), []
    for ranks in (2**i for i in range(3, 11)):
        row = [f"{ranks:,}", f"{ms(estimate(CALL, ranks, rates, 'gather', backward=True).compute)}"]
        for per_node, names in (
            (1024, ("gather", "heads")),
            (8, ("gather", "heads", "blocks", ("gather", "heads"))),
        ):
            network = rates._replace(ranks_per_node=per_node)
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


def scaling() -> str:
    """Returns the measured results, or a sentence that says that there are none."""
    files = [MEASURED.with_name(f"{MEASURED.stem}{suffix}.json") for suffix in ("", "-4m")]
    found = [measured(json.loads(file.read_text())) for file in files if file.is_file()]
    return "\n\n".join(found) or "These results are not measured yet."


def measured(report: dict[str, Any]) -> str:
    """Returns the results of one run of `examples/scaling.py`."""
    rows = []
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "GPUs": lambda x: str(x["ranks"]),
        "tokens": lambda x: size(x["length"]),
        "exchange": lambda x: x["error"] if "error" in x else x["exchange"] * (x["ranks"] > 1),
        "forward ms": lambda x: f"{x['forward_ms']:,.0f}",
        "with backward ms": lambda x: f"{x['both_ms']:,.0f}",
        "speed-up": lambda x: f"{x['both_speedup']:.2f}",
        "weak": lambda x: f"{x['both_weak']:.2f}",
        "exposed": lambda x: f"{x['both_exposed']:.1%}",
        "imbalance": lambda x: f"{x['both_imbalance']:.1%}",
        "peak GiB": lambda x: f"{(x.get('both_MiB') or x['forward_MiB']) / 1024:.1f}",
        "modeled ms": lambda x: f"{x.get('modeled_both_ms') or x['modeled_forward_ms']:,.0f}",
    }
    for x in report["results"]:
        row = []
        for column in columns.values():
            try:
                row.append(column(x))
            except KeyError:  # not measured
                row.append("")
        rows.append(row)
    o = report["options"]
    links = [x["link_GB_per_s"] for x in report["results"] if "link_GB_per_s" in x]
    about = (
        f"{report['processes']} {report['device']}, torch {report['torch']}, Triton "
        f"{report['triton']}, {report['date']}; {o['heads']} query heads, {o['kv_heads']} KV "
        f"heads, head dim {o['head_dim']}, block {o['block_size']}, topk {o['topk']}, "
        f"bfloat16; a rank receives {min(links):.0f} to {max(links):.0f} GB/s."
    )
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    names = [list(columns)[i] for i in used]
    return f"{about}\n\n{table(names, [[row[i] for i in used] for row in rows])}"


def training() -> str:
    """Returns the measured training steps, or a sentence that says that there are none."""
    file = MEASURED.with_name(f"{MEASURED.stem}-training.json")
    if not file.is_file():
        return "A step at full size is not measured yet."
    x = json.loads(file.read_text())
    o = x["options"]
    row = [f"{x['parameters'] / 1e9:.2f}B", str(o["context_parallel"]), size(o["length"])]
    row += [f"{o['block_size']}, {o['topk']}", f"{x['step_ms'] / 1e3:.1f}"]
    row += [f"{x['tokens_per_second']:,.0f}", f"{x['peak_MiB'] / 1024:.1f}"]
    names = ["parameters", "GPUs", "tokens", "block, topk", "seconds of a step", "tokens/s"]
    about = (
        f"One context of random bytes on {x['device']}, torch {x['versions']['torch']}, bfloat16 "
        f"autocast, {o['layers']} layers of width {o['dim']}, with `--fsdp --recompute`:"
    )
    return f"{about}\n\n{table([*names, 'peak GiB of a GPU'], [row])}"


def ms(seconds: float) -> str:
    """Returns milliseconds with two or more digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "exchanges": exchanges,
    "selected": selected,
    "blocks": blocks,
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
