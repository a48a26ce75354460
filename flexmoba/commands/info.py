"""What is installed, and which implementation ``impl="auto"`` chooses here, and why."""

import argparse
from typing import Any

import torch

from flexmoba.backends import IMPLS, resolve, why_not
from flexmoba.checks import DTYPES
from flexmoba.reporting import add_device, add_json, check_writable, positive, versions, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flexmoba info``."""
    on_gpu = torch.cuda.is_available()
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES],
        default="bfloat16" if on_gpu else "float32",
        help="of the inputs that a call would have (default: %(default)s)",
    )
    parser.add_argument("--head-dim", type=positive, default=128, help="default: %(default)s")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints it."""
    check_writable(json=arguments.json)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    report = describe(device, dtype, arguments.head_dim)
    if not write_json(report, arguments.json):
        return 0
    implementations = report.pop("implementations")
    for name, value in report.items():
        print(f"{name:<16} {'none' if value is None else value}")
    print()
    for name, reason in implementations.items():
        chosen = " <- auto" if name == report["auto"] else ""
        print(f"{name:<16} {'available' if reason is None else reason}{chosen}")
    return 0


def describe(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Versions, the device, and for each implementation why it cannot serve, or None."""
    q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    return {
        **versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "inputs": f"{str(dtype).removeprefix('torch.')}, head dim {head_dim}",
        "auto": resolve("auto", q, q, q),
        "implementations": {impl: why_not(impl, q, q, q) for impl in IMPLS if impl != "auto"},
    }
