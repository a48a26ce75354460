"""Figures of matplotlib that belong to no window and no notebook, for files of every format."""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def mpl(module: str) -> Any:
    """A module of matplotlib, also where ``MPLBACKEND`` names a backend that is not installed.

    A notebook sets that variable, and programs started from it may run in another environment.

    Raises:
        ImportError: matplotlib is missing.
    """
    first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None) if first else None  # which may fail the import
    try:
        imported = importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("pictures need matplotlib; pip install 'flexmoba[plot]'") from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            sys.modules["matplotlib"].rcParams["backend"] = backend  # as its import would have
    return imported


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure of some inches, drawn the same everywhere."""
    figure: Figure = mpl("figure").Figure(
        figsize=size, dpi=120, layout="constrained", facecolor="white"
    )
    return figure


def log_scale(axes: "Axes", text: str = "{:g}", factor: float = 1.0) -> None:
    """A logarithmic x axis with numbers at 1, 2 and 5, which do not overlap."""
    ticker = mpl("ticker")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: text.format(x * factor)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def can_draw(file: Path) -> bool:
    """Whether a figure can be written in the format that the name of a file ends in."""
    return file.suffix[1:].lower() in new_figure((1, 1)).canvas.get_supported_filetypes()
