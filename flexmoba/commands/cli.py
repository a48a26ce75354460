"""The command line: ``flexmoba`` and ``python -m flexmoba``."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from flexmoba import __version__
from flexmoba.commands import bench, demo, info, tune
from flexmoba.reporting import UsageError

EXIT_CODES = """exit codes:
  0    done
  1    done, and what was measured is not as it should be: a result differs from MoBA in float64,
       or (tune) nothing keeps to the budget
  2    not done: wrong options, or something is missing; the message says what to do
  130  interrupted by Ctrl-C; what was measured by then is printed, and written where --json says"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="flexmoba",
        description="Mixture of Block Attention on this machine.",
        epilog=f"flexmoba COMMAND --help explains a command\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flexmoba {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add(
        commands,
        demo,
        "demo",
        "train a small model with flex_moba, check, time and draw its attention",
        "flexmoba demo --seconds 20 --max-length 4096",
    )
    _add(
        commands,
        bench,
        "bench",
        "check and time flex_moba beside dense attention",
        "flexmoba bench --preset flashmoba --json results.json --plot results.png",
    )
    _add(
        commands,
        tune,
        "tune",
        "choose block size and topk for a model's own queries and keys",
        "flexmoba tune --example --sparsity 0.9 --plot frontier.png\n"
        "         flexmoba tune --model ./my-model --text book.txt --latency-ms 5 --json tune.json",
    )
    _add(
        commands,
        info,
        "info",
        'print versions, the device and what impl="auto" chooses',
        "flexmoba info --dtype float32 --head-dim 64",
    )
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()  # while a closed pipe can still be told from an error
    except UsageError as error:
        parser.exit(2, f"flexmoba: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "flexmoba: interrupted\n")
    except BrokenPipeError:  # the reader, `head` say, has enough
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
