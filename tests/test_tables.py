"""Tests that the tables of docs/distributed.md are those of the results and of the cost model."""

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_tables_are_filled():
    filled = runpy.run_path(str(DOCS / "tables.py"))["filled"]
    page = (DOCS / "distributed.md").read_text()
    assert filled(page) == page
    assert filled(page.replace("| 1,024 |", "| 1,025 |", 1)) == page


def test_measured_results_fill_a_table(tmp_path, monkeypatch):
    tables = runpy.run_path(str(DOCS / "tables.py"))
    scaling, machine = tables["scaling"], tables["machine"]
    times = {"forward_ms": 1800.4, "both_ms": 8200.0, "both_MiB": 69632.0}
    two = {"exchange": "gather", "both_speedup": 1.95, "both_weak": 0.953, "both_exposed": 0.004}
    two |= {"both_imbalance": 0.0236, "modeled_both_ms": 4216.0, "link_GB_per_s": 150.0}
    report = {
        "device": "NVIDIA H100", "processes": 2,
        "torch": "2.11.0", "triton": "3.6.0", "date": "today",
        "options": {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 4096, "topk": 12},
        "machine": {"forward_flops": 4e14, "backward_flops": 3e14, "link": 1.5e11},
        "results": [
            {"ranks": 1, "length": 2**20, "exchange": "none", **times},
            {"ranks": 2, "length": 2**20, **times, **two},
            {"ranks": 1, "length": 2**22, "error": "out of memory"},
        ],
    }  # fmt: skip
    file = tmp_path / "h100-x2.json"
    file.write_text(json.dumps(report))
    monkeypatch.setitem(scaling.__globals__, "MEASURED", file)
    lines = scaling().splitlines()
    assert "2 NVIDIA H100, torch 2.11.0" in lines[0]
    assert "150 to 150 GB/s" in lines[0]
    assert lines[4] == "| 1 | 1M |  | 1,800 | 8,200 |  |  |  |  | 68.0 |  |"
    row = "| 2 | 1M | gather | 1,800 | 8,200 | 1.95 | 0.95 | 0.4% | 2.4% | 68.0 | 4,216 |"
    assert lines[5] == row
    assert lines[6] == "| 1 | 4M | out of memory |  |  |  |  |  |  |  |  |"
    assert machine().link == 1.5e11
    assert machine().network == 5e10
    forward = {"forward_ms": 3714.0, "forward_MiB": 56320.0, "modeled_forward_ms": 3700.0}
    four = {"ranks": 2, "length": 2**22, "exchange": "gather", **forward, "link_GB_per_s": 150.0}
    (tmp_path / "h100-x2-4m.json").write_text(json.dumps(report | {"results": [four]}))
    last = scaling().splitlines()[-3:]
    assert last[0] == "| GPUs | tokens | exchange | forward ms | peak GiB | modeled ms |"
    assert last[2] == "| 2 | 4M | gather | 3,714 | 55.0 | 3,700 |"


def test_a_measured_training_step_fills_a_table(tmp_path, monkeypatch):
    training = runpy.run_path(str(DOCS / "tables.py"))["training"]
    options = {"context_parallel": 2, "length": 2**19, "block_size": 4096, "topk": 12}
    options |= {"layers": 10, "dim": 3072}
    times = {"step_ms": 25500.0, "tokens_per_second": 20560.3, "peak_MiB": 71680}
    about = {"parameters": 1006632960, "device": "NVIDIA H100", "versions": {"torch": "2.11.0"}}
    monkeypatch.setitem(training.__globals__, "MEASURED", tmp_path / "h100-x2.json")
    assert training() == "A step at full size is not measured yet."
    file = tmp_path / "h100-x2-training.json"
    file.write_text(json.dumps(about | times | {"options": options}))
    row = "| 1.01B | 2 | 512K | 4096, 12 | 25.5 | 20,560 | 70.0 |"
    assert training().splitlines()[-1] == row
