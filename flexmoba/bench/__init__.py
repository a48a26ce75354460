"""How fast flex_moba is on this device, beside dense attention, and whether it is right.

Every configuration is first compared with float64 attention on sampled queries; one that disagrees
is reported as wrong and not timed. Times are medians over repeated calls (CUDA events on a GPU),
of the whole call, gate included; all of one run, on one device.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexmoba.bench.calls import ROUNDINGS, describe, matrix_rate, measure
from flexmoba.bench.configs import PRESETS, Config
from flexmoba.bench.report import plot, tables
from flexmoba.bench.steps import measure_step


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE, too")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the times (needs matplotlib)"
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="show an earlier --json FILE; measure nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints, or writes, the tables; 1 if a result was wrong, 2 if none is made."""
    problem = _why_not_written(arguments)
    if problem:  # found out before anything is measured, not after
        print(problem, file=sys.stderr)
        return 2
    earlier = arguments.show
    report = json.loads(earlier.read_text()) if earlier else _measure_all(arguments)
    print(tables(report))
    if arguments.plot:
        plot(report, arguments.plot)
    return int(any(result["error"] > result["allowed"] for result in report["results"]))


def _why_not_written(arguments: argparse.Namespace) -> str | None:
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib; pip install 'flexmoba[plot]'"
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path and not path.parent.is_dir():
            return f"{option} {path}: there is no folder {path.parent}; make it first"
    if arguments.show and not arguments.show.is_file():
        return f"--show {arguments.show}: there is no such file; --json writes one"
    return None


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
    print(*(f"{key}: {value}" for key, value in report.items() if key != "results"), sep="\n")
    for config in _progress(configs):
        measured = (measure_step if config.decode else measure)(config, device, dtype)
        report["results"].append(asdict(config) | measured)
        if arguments.json:  # after every row, so that what was measured is not lost
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _progress(configs: list[Config]) -> Iterator[Config]:
    """Shows which configuration runs, if tqdm is there to show it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from configs
        return
    bar = tqdm(configs, file=sys.stderr, leave=False, disable=None)
    for config in bar:
        bar.set_description(str(config))
        yield config
