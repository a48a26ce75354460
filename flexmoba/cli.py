"""The command line: ``flexmoba`` and ``python -m flexmoba``."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from flexmoba import bench, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="flexmoba", description="Mixture of Block Attention on this machine."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add(
        commands,
        bench,
        "bench",
        "check and time flex_moba beside dense attention",
        "example: flexmoba bench --preset flashmoba --json results.json --plot results.png",
    )
    _add(
        commands,
        info,
        "info",
        'print versions, the device and what impl="auto" chooses',
        "example: flexmoba info --dtype float32 --head-dim 64",
    )
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {chosen.device}: there is no CUDA device here; try --device cpu")
    code: int = chosen.run(chosen)
    return code


def _add(commands: Any, module: Any, name: str, summary: str, example: str) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=example,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
