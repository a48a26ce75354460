"""The command line program: ``flexmoba`` and ``python -m flexmoba``."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from flexmoba import __version__
from flexmoba.commands import bench, demo, info, serve, tune
from flexmoba.reporting import UsageError

EXIT_CODES = """exit codes:
  0    success
  1    completed, but a result differs from MoBA in float64, or (tune) no choice meets the budget
  2    wrong usage, or something is missing; the message names the remedy
  130  interrupted by Ctrl-C; the results so far are printed, and written with --json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="flexmoba",
        description="Check, time and tune Mixture of Block Attention on this machine.",
        epilog=f"Run flexmoba COMMAND --help for the options of a command.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flexmoba {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add(
        commands,
        demo,
        "demo",
        "train a small model with flex_moba, and check, time and plot its attention",
        "flexmoba demo --seconds 20 --max-length 4096",
    )
    _add(
        commands,
        bench,
        "bench",
        "check and time flex_moba and dense attention",
        "flexmoba bench --preset flashmoba --json results.json --plot results.png",
    )
    _add(
        commands,
        tune,
        "tune",
        "measure block sizes and topks on the queries and keys of a model",
        "flexmoba tune --example --sparsity 0.9 --plot frontier.png\n"
        "         flexmoba tune --model ./my-model --text book.txt --latency-ms 5 --json tune.json",
    )
    _add(
        commands,
        serve,
        "serve",
        "serve a converted model over HTTP by transformers",
        "flexmoba serve ./my-model --port 8000",
    )
    _add(
        commands,
        info,
        "info",
        'print versions, the device and the backend of impl="auto"',
        "flexmoba info --dtype float32 --head-dim 64",
    )
    parsed = parser.parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()  # raises BrokenPipeError here, not at exit
    except UsageError as error:
        parser.exit(2, f"flexmoba: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "flexmoba: interrupted\n")
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _add(commands: Any, module: Any, name: str, summary: str, example: str) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: {example}\n\n{EXIT_CODES}",
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
