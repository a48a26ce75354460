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
