"""The command line: ``flexmoba`` and ``python -m flexmoba``."""

import argparse
from collections.abc import Sequence

from flexmoba import bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="flexmoba", description="Mixture of Block Attention on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bench_parser = commands.add_parser(
        "bench",
        help="check and time flex_moba beside dense attention",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: flexmoba bench --preset flashmoba --json results.json --plot results.png",
    )
    bench.add_arguments(bench_parser)
    return bench.run(parser.parse_args(arguments))
