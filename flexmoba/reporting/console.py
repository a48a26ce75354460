"""Options, tables, progress and usage errors of commands and examples."""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from flexmoba.reporting.figure import can_draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


class UsageError(Exception):
    """An error of usage, which the command prints without a traceback and exits with 2."""


def positive(text: str) -> int:
    """Parses an option that is a positive integer."""
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, by default ``cuda`` if available, else ``cpu``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=_device, default=default, help="cuda or cpu (default: %(default)s)"
    )


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name}: unknown device type; use cuda or cpu") from error
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name}: the device must be cuda or cpu; use cpu")
    if device.type == "cuda" and not n_gpus:
        raise argparse.ArgumentTypeError(f"{name}: there is no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise argparse.ArgumentTypeError(f"{name}: there are {n_gpus} CUDA devices; use cuda:0")
    return name


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json [FILE]``, None by default and ``"-"`` without FILE."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print JSON instead of tables; with FILE, print the tables and write JSON to FILE",
    )


def write_json(report: dict[str, Any], to: str | None) -> bool:
    """Prints or writes a report as JSON.

    Args:
        report: The report.
        to: The value of ``--json``: ``"-"`` prints, a path writes, None does nothing.

    Returns:
        Whether the command must still print tables.
    """
    text = json.dumps(report, indent=1, allow_nan=False)
    if to == "-":
        print(text)
    elif to is not None:
        try:
            Path(to).write_text(text + "\n")
        except OSError as error:  # measurements take long, so they must not be lost
            print(text)
            raise UsageError(
                f"--json {to}: cannot be written ({error.strerror}); copy the JSON above"
            ) from error
    return to != "-"


def check_writable(**options: str | Path | None) -> None:
    """Raises unless the output files can be written, before the work begins.

    Args:
        options: The path for each option; ``"-"`` and None are not files. The path for ``plot``
            also needs matplotlib and a suffix that it supports.

    Raises:
        UsageError: A file cannot be written.
    """
    for option, path in options.items():
        if path is None or path == "-":
            continue
        try:
            _check_file(option, Path(path))
        except OSError as error:
            raise UsageError(
                f"--{option} {path}: cannot be written ({error.strerror}); choose another file"
            ) from error


def parse_writable(parser: argparse.ArgumentParser, **options: str | Path | None) -> None:
    """Calls `check_writable`; its error is one of the parser, which prints it and exits with 2."""
    try:
        check_writable(**options)
    except UsageError as error:
        parser.error(str(error))


def _check_file(option: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise UsageError(f"--{option} {file}: there is no folder {file.parent}; create it first")
    if file.is_dir():
        raise UsageError(f"--{option} {file}: this is a folder; pass a file in it")
    if option == "plot":
        _check_drawable(file)
    if file.is_file():
        file.open("a").close()
    elif not file.exists():  # not for a pipe, whose reader would see the end of the data
        tempfile.TemporaryFile(dir=file.parent).close()


def _check_drawable(file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; run pip install 'flexmoba[plot]'")
    if not can_draw(file):
        raise UsageError(
            f"--plot {file}: matplotlib has no format {file.suffix!r}; use the suffix .png, .svg "
            "or .pdf"
        )


def save_picture(figure: "Figure", option: str, file: Path) -> None:
    """Writes a figure of results that are already printed."""
    try:
        figure.savefig(file)
    except OSError as error:
        raise UsageError(
            f"--{option} {file}: cannot be written ({error.strerror}); choose another file"
        ) from error


def note(text: str) -> None:
    """Prints progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def note_load(device: str) -> None:
    """Prints a note if other programs use the cores of a CPU on which threads wait for each other.

    Unless the policy is passive, a waiting OpenMP thread keeps its core busy, and the thread that
    it waits for cannot run there.
    """
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if device != "cpu" or passive or not hasattr(os, "getloadavg"):
        return
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads()
    if threads > 1 and load + threads > cores + 1:
        note(
            f"{threads} threads on {cores} cores with a load of {load:.1f}: other programs slow "
            "flex_moba more than dense attention; set OMP_WAIT_POLICY=passive before the start"
        )


def print_result(text: str, json: str | None) -> None:
    """Prints a result at once, to standard error if standard output is for JSON."""
    print(text, file=sys.stderr if json == "-" else sys.stdout, flush=True)


def progress(items: Sequence[T], label: str, *, seconds: float = 10.0) -> Iterator[T]:
    """Yields the items, and prints the number of finished ones at most every ``seconds``."""
    noted = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - noted > seconds:
            noted = time.monotonic()
            note(f"{label}: {i} of {len(items)}")
        yield item


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table with aligned columns."""
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(headings))]
    head, *rest = (table_row(line, widths) for line in lines)
    return "\n".join([head, table_rule(widths), *rest])


def table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Formats one line of a table, for a table that is printed line by line."""
    padded = [x.rjust(width) for x, width in zip(cells, widths, strict=True)]
    return f"| {' | '.join(padded)} |"


def table_rule(widths: Sequence[int]) -> str:
    """Formats the line below the headings of a table."""
    return table_row(["-" * (width - 1) + ":" for width in widths], widths)
