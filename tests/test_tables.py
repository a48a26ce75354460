"""Tests that the tables of docs/distributed.md are those of the results and of the cost model."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from flexmoba.distributed import Machine, SpreadCall, estimate
from flexmoba.distributed.choice import _ARRANGE, _LINK, Shape, resolve_exchange

DOCS = Path(__file__).parent.parent / "docs"


def test_the_tables_are_filled():
    filled = runpy.run_path(str(DOCS / "tables.py"))["filled"]
    page = (DOCS / "distributed.md").read_text()
    assert filled(page) == page
    assert filled(page.replace("| 1,024 |", "| 1,025 |", 1)) == page


@pytest.mark.parametrize("gpus", [2, 4])
def test_auto_is_the_fastest_measured_exchange(gpus):
    tables = runpy.run_path(str(DOCS / "tables.py"))
    report, machine = tables["read"](f"h100-x{gpus}"), tables["machine"]()
    assert pytest.approx((machine.link, machine.arrange), rel=0.05) == (_LINK, _ARRANGE)
    times = {x["exchange"]: x["both_ms"] for x in report["results"] if x["ranks"] == gpus}
    o, lengths = report["options"], (int(report["options"]["length"]) // gpus,) * gpus
    shape = Shape(int(o["heads"]), int(o["kv_heads"]), lengths, (0,) * gpus, "token")
    assert resolve_exchange("auto", shape) == min(times, key=times.__getitem__) == "heads"


def reports() -> dict[str, dict[str, Any]]:
    """Returns reports of two GPUs whose exposed times have known causes."""
    options = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 4096, "topk": 12}
    about = {"device": "NVIDIA H100", "processes": 2, "torch": "2.11.0", "triton": "3.6.0"}
    about |= {"commit": "0123456789", "date": "today", "options": options}
    call = SpreadCall(32, 8, 2**20, 4096, 12)
    machine = Machine(4e14, 3e14, 1.5e11, 5e10, 8, arrange=2e11, chunk_overhead=0.02)
    alone, two = ({}, {"ranks": 2, "length": 2**20, "exchange": "gather", "link_GB_per_s": 150.0})
    for name, backward in (("forward", False), ("both", True)):
        alone[f"{name}_ms"] = estimate(call, 1, machine, "gather", backward=backward).total * 1e3
        cost = estimate(call, 2, machine, "gather", backward=backward)
        two |= {f"{name}_ms": cost.total * 1e3, f"compute_{name}_ms": cost.compute * 1e3}
    two |= {"both_speedup": 1.951, "both_weak": 0.953, "both_exposed": 0.004, "both_MiB": 69632.0}
    two["both_imbalance"] = 0.025
    one = {"ranks": 1, "length": 2**20, "exchange": "none", **alone}
    more = {"ranks": 2, "length": 2**22, "exchange": "gather", "forward_ms": 3714.0}
    more |= {"forward_MiB": 56320.0, "forward_weak": 0.9, "link_GB_per_s": 160.0}
    error = {"ranks": 1, "length": 2**22, "error": "out of memory"}
    step = {"step_ms": 25500.0, "tokens_per_second": 20560.3, "peak_MiB": 71680}
    sizes = {"context_parallel": 2, "length": 2**19, "layers": 10, "dim": 3072}
    sizes |= {"block_size": 4096, "topk": 12}
    larger = {"context_parallel": 4, "fsdp_processes": 2, "length": 2**20}
    training = {"parameters": 1006632960, "device": "NVIDIA H100", "versions": {"torch": "2.11.0"}}
    return {
        "x2": about | {"results": [one, two]},
        "x2-4m": about | {"results": [error, more]},
        "x2-training": training | {"options": sizes} | step,
        "x4-training": training | {"options": sizes | larger} | step,
    }


@pytest.fixture
def tables(monkeypatch) -> dict[str, Any]:
    tables = runpy.run_path(str(DOCS / "tables.py"))
    names = tables["machine"].__wrapped__.__globals__
    monkeypatch.setitem(names, "read", reports().__getitem__)
    monkeypatch.setitem(names, "RUNS", ("x2",))
    monkeypatch.setitem(names, "LONG_RUNS", ("x2-4m",))
    monkeypatch.setitem(names, "TRAINING", ("x2-training", "x4-training"))
    return names


def test_the_rates_are_found_in_the_results(tables):
    found = tables["machine"]()
    assert found[:4] == pytest.approx((4e14, 3e14, 1.5e11, 5e10))
    assert found.arrange == pytest.approx(2e11)
    assert found.chunk_overhead == pytest.approx(0.02)
    assert "| `arrange` | 200 GB/s |" in tables["rates"]()


def test_measured_results_fill_a_table(tables):
    about, _, *lines = tables["scaling"]().splitlines()
    assert about.startswith("All runs: 32 query heads, 8 KV heads")
    assert "2 NVIDIA H100 of one host, torch 2.11.0" in lines[0]
    assert "150 to 150 GB/s" in lines[0]
    assert lines[2].endswith("| exposed | imbalance | peak GiB | modeled |")
    cost = estimate(SpreadCall(32, 8, 2**20, 4096, 12), 2, tables["machine"](), "gather")
    two = reports()["x2"]["results"][1]
    both, exposed = two["both_ms"], 1 - two["compute_both_ms"] / two["both_ms"]
    assert lines[5] == (
        f"| 2 | 1M | gather | {cost.total * 1e3:,.0f} | {both:,.0f} | 1.95 | 0.95 | 0.4% "
        f"| 2.5% | 68.0 | {both:,.0f} ({exposed:.1%}) |"
    )
    after = lines.index("Raw results: [`x2.json`](scaling/x2.json).") + 2
    assert "a rank receives 160 to 160 GB/s" in lines[after]
    assert lines[after + 2] == "| GPUs | tokens | exchange | forward ms | weak | peak GiB |"
    assert lines[after + 4] == "| 1 | 4M | out of memory |  |  |  |"
    assert lines[after + 5] == "| 2 | 4M | gather | 3,714 | 0.90 | 55.0 |"


def test_measured_training_steps_fill_a_table(tables):
    lines = tables["training"]().splitlines()
    assert lines[4] == "| 1.01B | 2 NVIDIA H100 | 2 | 512K | 4096, 12 | 25.5 | 20,560 | 70.0 |"
    assert lines[5] == "| 1.01B | 4 NVIDIA H100 | 2 | 1M | 4096, 12 | 25.5 | 20,560 | 70.0 |"
    assert lines[-1].endswith(
        "(scaling/x2-training.json), [`x4-training.json`](scaling/x4-training.json)."
    )
