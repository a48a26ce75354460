"""How fast flex_moba is on this device, beside dense attention, and whether it is right.

Every configuration is first compared with float64 attention on sampled queries; one that disagrees
is reported as wrong and not timed. Times are medians over repeated calls (CUDA events on a GPU),
of the whole call, gate included; all of one run, on one device.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexmoba.bench.calls import ROUNDINGS, describe, matrix_rate, measure
from flexmoba.bench.configs import PRESETS, Config
from flexmoba.bench.report import plot, tables
from flexmoba.bench.steps import measure_step
from flexmoba.console import UsageError, add_json, check_writable, progress, write_json

__all__ = ["PRESETS", "Config", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flexmoba bench``."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+",
        default=["quick" if on_gpu else "cpu"],
        help="which configurations (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="cuda or cpu")
    parser.add_argument(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in ROUNDINGS],
        default="bfloat16" if on_gpu else "float32",
    )
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the times (needs matplotlib)"
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="show an earlier --json FILE; measure nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints, or writes, the tables; 1 if a result was wrong."""
    check_writable(json=arguments.json, plot=arguments.plot)
    earlier = arguments.show
    if earlier and not earlier.is_file():
        raise UsageError(f"--show {earlier}: there is no such file; --json writes one")
    report = json.loads(earlier.read_text()) if earlier else _measure_all(arguments)
    if write_json(report, arguments.json):
        print(tables(report))
    if arguments.plot:
        plot(report, arguments.plot)
    return int(any(result["error"] > result["allowed"] for result in report["results"]))


def _measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    configs = [config for preset in arguments.preset for config in PRESETS[preset]]
    report: dict[str, Any] = {
        "command": f"flexmoba bench --preset {' '.join(arguments.preset)}",
        **describe(device),
        "dtype": arguments.dtype,
        "matrix_tflops": matrix_rate(device, dtype),
        "results": [],
    }
    heading = (f"{key}: {value}" for key, value in report.items() if key != "results")
    print(*heading, sep="\n", file=sys.stderr)
    for config in progress(configs, "bench"):
        measured = (measure_step if config.decode else measure)(config, device, dtype)
        report["results"].append(asdict(config) | measured)
        if arguments.json not in (None, "-"):  # after every row, so that no result is lost
            write_json(report, arguments.json)
    return report
