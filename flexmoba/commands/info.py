"""Print versions, the device, and the backends that support the inputs of a call."""

import argparse
from typing import Any

import torch

from flexmoba.backends import IMPLS, resolve, why_not
from flexmoba.checks import DTYPES
from flexmoba.reporting import add_device, add_json, check_writable, positive, versions, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexmoba info``."""
    on_gpu = torch.cuda.is_available()
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES],
        default="bfloat16" if on_gpu else "float32",
        help="dtype of the inputs (default: %(default)s)",
    )
    parser.add_argument(
        "--head-dim", type=positive, default=128, help="head dim (default: %(default)s)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints or writes the description; returns 0."""
    check_writable(json=arguments.json)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    report = describe(device, dtype, arguments.head_dim)
    if not write_json(report, arguments.json):
        return 0
    backends = report.pop("implementations")
    for name, value in report.items():
        print(f"{name:<16} {'none' if value is None else value}")
    print()
    for name, reason in backends.items():
        mark = " <- auto" if name == report["auto"] else ""
        print(f"{name:<16} {'available' if reason is None else reason}{mark}")
    return 0


def describe(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Describes the installation for inputs of a dtype and head dim.

    Returns:
        Versions, the device, the backend of ``impl="auto"``, and for each backend the reason why it
        does not support the inputs, or None.
    """
    q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    return {
        **versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "inputs": f"{str(dtype).removeprefix('torch.')}, head dim {head_dim}",
        "auto": resolve("auto", q, q, q),
        "implementations": {impl: why_not(impl, q, q, q) for impl in IMPLS if impl != "auto"},
    }
