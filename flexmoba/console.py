"""What the commands of `flexmoba.cli` share: options, tables, progress bars, errors of usage."""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from flexmoba.figure import can_draw

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


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """The items, beside a bar on a terminal if tqdm is there to draw it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, desc=label, file=sys.stderr, leave=False, disable=None)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, numbers to the right."""
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]
    cells = [[x.rjust(width) for x, width in zip(line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
