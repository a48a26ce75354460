"""Figures of matplotlib for files, independent of windows and notebooks."""

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
    """Imports a module of matplotlib, even if ``MPLBACKEND`` names a backend that is missing.

    A notebook sets this variable, and a program that it starts may run in another environment.

    Raises:
        ImportError: matplotlib is missing.
    """
    first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None) if first else None  # can make the import fail
    try:
        imported = importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("pictures need matplotlib; run pip install 'flexmoba[plot]'") from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            sys.modules["matplotlib"].rcParams["backend"] = backend  # as the import would have done
    return imported


def new_figure(size: tuple[float, float]) -> "Figure":
    """Returns an empty figure of ``size`` inches with fixed resolution, layout and background."""
    figure: Figure = mpl("figure").Figure(
        figsize=size, dpi=120, layout="constrained", facecolor="white"
    )
    return figure


def log_scale(axes: "Axes", text: str = "{:g}", factor: float = 1.0) -> None:
    """Makes the x axis logarithmic, with labels at 1, 2 and 5 that do not overlap."""
    ticker = mpl("ticker")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: text.format(x * factor)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def can_draw(file: Path) -> bool:
    """Returns whether matplotlib supports the format of the file's suffix."""
    return file.suffix[1:].lower() in new_figure((1, 1)).canvas.get_supported_filetypes()
