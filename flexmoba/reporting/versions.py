"""The versions, the commit and the date that every report contains."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import flexmoba

CHECKOUT = Path(flexmoba.__file__).parent.parent


def versions() -> dict[str, str | None]:
    """Returns versions, commit and date by name; None for a missing one."""
    return {
        "flexmoba": flexmoba.__version__,
        "commit": _commit(CHECKOUT),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


@functools.cache
def _commit(folder: Path) -> str | None:
    """Returns the commit of a checkout, with ``-dirty`` if tracked files differ from it."""
    if not (folder / ".git").exists():  # it may be installed inside another checkout
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # git is missing or fails
        return None
    return git.stdout.strip()


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
