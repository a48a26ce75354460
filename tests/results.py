"""Reads JSON files of docs/results/ and tables of pages, for the tests that compare both."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def report_of(name: str) -> dict[str, Any]:
    """Returns a JSON file of docs/results/."""
    report: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text())
    return report


def runs_of(name: str) -> dict[str, Any]:
    """Returns the runs of a JSON file of sweep.py."""
    runs: dict[str, Any] = report_of(name)["runs"]
    return runs


def page(name: str = "docs/results.md") -> str:
    """Returns the text of a page."""
    return (ROOT / name).read_text()


def section(heading: str, end: str) -> str:
    """Returns the text of docs/results.md between two lines."""
    return page().split(f"\n{heading}\n", 1)[1].split(f"\n{end}", 1)[0]


def table(heading: str, name: str = "docs/results.md") -> list[list[str]]:
    """Returns the cells of the first table after a line that begins with ``heading``."""
    lines = page(name).split(f"\n{heading}", 1)[1].split("\n\n")
    rows = next(x for x in lines if x.startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def own(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the losses of a run by the attention that it was trained with."""
    attention = run["options"]["attention"]
    losses: dict[str, Any] = run["final"][attention if attention in run["final"] else "moba"]
    return losses


def with_increase(loss: float, full: float) -> str:
    """Returns a cell with a loss and its increase over full attention's."""
    return f"{loss:.4f}" + (f" ({loss - full:+.3f})" if loss != full else "")


def error_of(x: dict[str, Any], full: dict[str, Any], part: str = "by_window") -> float:
    """Returns the standard error, over contexts, of the difference of two losses."""
    found = [a - b for a, b in zip(x[part], full[part], strict=True)]
    return statistics.stdev(found) / len(found) ** 0.5
