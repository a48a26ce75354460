"""Check and time flex_moba, flex_nsa and dense attention on this device.

The command first compares each configuration with float64 attention on sampled queries. It reports
a configuration with too large an error as WRONG, and does not time it. A time is the median over
repeated whole calls, including the gate, measured by CUDA events on a GPU. All times are from one
run on one device. The command prints each result at once, and tables of all results at the end. It
reports a configuration that fails, for example for lack of memory, as FAILED. If several results
differ only in length, it also prints the length from which MoBA is faster.

Presets:
  cpu          4K to 16K tokens, for a CPU
  quick        8K and 32K tokens; on a CPU, the same as cpu
  flashmoba    8K to 128K tokens
  targets      8K to 10M tokens, each with the target of this project
  paper        128K and 1M tokens, block 4096, topk 12
  longest      1M and 10M tokens, forward
  million      1M tokens of 32 query heads, 256 and 8,192 blocks, on one card of 80 GB
  gates        gate="token", "group" and "tile" at 64K tokens
  documents    64K tokens in 1 to 1024 packed documents
  correlated   random queries beside queries whose neighbours select similar blocks
  training     training steps of a GPT of 12 layers, 32K and 64K tokens a step
  decode       decoding steps at contexts of 32K to 1M tokens
  paged        batches of a server over pages: 1 to 256 sequences of 4K to 128K tokens, with chunks
  nsa          Native Sparse Attention at 8K to 64K tokens, and its decoding steps at 64K
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexmoba.bench import (
    FLASH_VERSIONS,
    PRESETS,
    ROUNDINGS,
    Config,
    describe,
    failure,
    line,
    matrix_rate,
    measure,
    measure_nsa,
    measure_paged,
    measure_step,
    measure_training,
    plot,
    tables,
    targets,
    why_not_flash,
)
from flexmoba.reporting import (
    UsageError,
    add_device,
    add_json,
    check_writable,
    note,
    note_load,
    print_result,
    save_picture,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexmoba bench``."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+",
        default=["quick" if on_gpu else "cpu"],
        metavar="NAME",
        help=f"the configurations to measure (default: {'quick' if on_gpu else 'cpu'})",
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in ROUNDINGS],
        default="bfloat16" if on_gpu else "float32",
        help="dtype of the inputs (default: %(default)s)",
    )
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the times to FILE (needs matplotlib)"
    )
    parser.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="show the FILE of an earlier --json, without measuring",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints or writes the results; returns 1 if one is wrong or has failed."""
    check_writable(json=arguments.json, plot=arguments.plot)
    report = _earlier(arguments.show) if arguments.show else _heading(arguments)
    try:
        if not arguments.show:
            _measure_all(report, arguments)
    finally:  # after an interruption or a failure, too
        if report["results"] and write_json(report, arguments.json):
            print(f"\n{tables(report)}")
    if arguments.plot:
        try:
            save_picture(plot(report), "plot", arguments.plot)
        except ValueError as error:  # every result is wrong; the exit code reports it
            print(f"--plot: {error}", file=sys.stderr)
    return int(
        any(
            "failed" in result or result["error"] > result["allowed"]
            for result in report["results"]
        )
    )


def _earlier(file: Path) -> dict[str, Any]:
    """Reads a report that ``--json`` wrote."""
    if not file.is_file():
        raise UsageError(f"--show {file}: there is no such file; write one with --json")
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        tables(report)
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"--show {file}: this is not a report of flexmoba bench; write one with --json"
        ) from error
    return report


def _heading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a report without results, and prints it to standard error."""
    device = torch.device(arguments.device)
    report: dict[str, Any] = {
        "command": f"flexmoba bench --preset {' '.join(arguments.preset)}",
        **describe(device),
        "dtype": arguments.dtype,
        "matrix_tflops": matrix_rate(device, getattr(torch, arguments.dtype)),
    }
    if device.type == "cuda":  # baselines that this torch cannot offer here, and why
        reasons = {f"no {version}": why_not_flash(version) for version in FLASH_VERSIONS}
        report |= {key: reason for key, reason in reasons.items() if reason is not None}
    print(*(f"{key}: {value}" for key, value in report.items()), sep="\n", file=sys.stderr)
    return report | {"results": []}


def _measure_all(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Measures the configurations and adds the results to the report."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    note_load(arguments.device)
    small = {"quick": "cpu"} if device.type == "cpu" else {}
    configs = [config for name in arguments.preset for config in PRESETS[small.get(name, name)]]
    for i, config in enumerate(configs, 1):
        note(f"{i} of {len(configs)}: {config}")
        try:
            measured = _measurement(config)(config, device, dtype)
        except Exception as error:  # such as too little memory; the others can be measured
            traceback.print_exc()
            measured = {"failed": failure(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for peaks that do not depend on earlier configurations
        report["results"].append(asdict(config) | measured)
        if rows := targets(report):
            report["targets"] = rows
        print_result(line(report["results"][-1]), arguments.json)
        if arguments.json not in (None, "-"):  # after every result, in case the process is killed
            write_json(report, arguments.json)


def _measurement(config: Config) -> Callable[..., dict[str, Any]]:
    """Returns the function that measures a configuration."""
    if config.nsa:
        return measure_nsa
    if config.layers:
        return measure_training
    if config.paged:
        return measure_paged
    return measure_step if config.decode else measure
