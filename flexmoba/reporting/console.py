"""What commands and examples share: options, tables, progress, errors of usage."""

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
    """What the user must do otherwise: printed without a traceback, with exit code 2."""


def positive(text: str) -> int:
    """The type of an option that is a count."""
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: that of CUDA if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=_device, default=default, help="cuda or cpu (default: %(default)s)"
    )


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"{name}: no such kind of device; try cuda or cpu"
        ) from error
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name}: must be cuda or cpu; try cpu")
    if device.type == "cuda" and not there:
        raise argparse.ArgumentTypeError(f"{name}: there is no CUDA device here; try --device cpu")
    if device.type == "cuda" and (device.index or 0) >= there:
        raise argparse.ArgumentTypeError(f"{name}: there are {there}; try cuda:0")
    return name


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json [FILE]``: None without it, ``"-"`` without FILE."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print JSON instead of tables; with FILE, print the tables and write JSON to FILE",
    )


def write_json(report: dict[str, Any], to: str | None) -> bool:
    """Does what ``--json`` asks for; whether tables are still to be printed."""
    text = json.dumps(report, indent=1, allow_nan=False)
    if to == "-":
        print(text)
    elif to is not None:
        try:
            Path(to).write_text(text + "\n")
        except OSError as error:  # what was measured is worth more than a tidy terminal
            print(text)
            raise UsageError(f"--json {to}: not written ({error.strerror}); see above") from error
    return to != "-"


def check_writable(**options: str | Path | None) -> None:
    """Finds out before the work, not after it, that a result could not be written.

    Args:
        options: Files to write by the name of their option; ``"-"`` and None for none. What is
            given for ``plot`` needs matplotlib, and an ending that it knows.
    """
    for option, path in options.items():
        if path is None or path == "-":
            continue
        try:
            _check_file(option, Path(path))
        except OSError as error:
            raise UsageError(
                f"--{option} {path}: cannot be written ({error.strerror}); name another file"
            ) from error


def _check_file(option: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise UsageError(f"--{option} {file}: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise UsageError(f"--{option} {file}: that is a folder; name a file in it")
    if option == "plot":
        _check_drawable(file)
    if file.is_file():
        file.open("a").close()
    elif not file.exists():  # a pipe is left alone: its reader would take the close for its end
        tempfile.TemporaryFile(dir=file.parent).close()


def _check_drawable(file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install 'flexmoba[plot]'")
    if not can_draw(file):
        raise UsageError(
            f"--plot {file}: matplotlib has no format {file.suffix!r}; let it end in .png, .svg "
            "or .pdf"
        )


def save_picture(figure: "Figure", option: str, file: Path) -> None:
    """Writes a picture of results that are printed already."""
    try:
        figure.savefig(file)
    except OSError as error:
        raise UsageError(f"--{option} {file}: not written ({error.strerror})") from error


def note(text: str) -> None:
    """Says on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)


def note_load(device: str) -> None:
    """Notes that other programs run on the cores of a CPU, where its threads wait for each other.

    A thread of OpenMP that waits keeps its core from the other one that it waits for, unless the
    policy is passive.
    """
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if device != "cpu" or passive or not hasattr(os, "getloadavg"):
        return
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads()
    if threads > 1 and load + threads > cores + 1:
        note(
            f"{threads} threads on {cores} cores with a load of {load:.1f}: if other programs run, "
            "they slow flex_moba more than dense attention; start with OMP_WAIT_POLICY=passive"
        )


def say(text: str, json: str | None) -> None:
    """Prints a result at once: where JSON is printed to standard output, on standard error."""
    print(text, file=sys.stderr if json == "-" else sys.stdout, flush=True)


def progress(items: Sequence[T], label: str, *, seconds: float = 10.0) -> Iterator[T]:
    """The items; every so many seconds it notes how many are done."""
    noted = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - noted > seconds:
            noted = time.monotonic()
            note(f"{label}: {i} of {len(items)}")
        yield item


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, numbers to the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]
    head, *rest = (table_row(line, widths) for line in lines)
    return "\n".join([head, table_rule(widths), *rest])


def table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table, for those that are printed line by line."""
    padded = [x.rjust(width) for x, width in zip(cells, widths, strict=True)]
    return f"| {' | '.join(padded)} |"


def table_rule(widths: Sequence[int]) -> str:
    """The line below the heads."""
    return table_row(["-" * (width - 1) + ":" for width in widths], widths)
