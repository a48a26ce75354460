"""Serve a converted model over HTTP, by the OpenAI-compatible server of transformers.

It runs on one machine. For more, serve the model by vLLM with the plugin of flexmoba.
"""

import argparse
import importlib

from flexmoba.reporting import UsageError, add_device, positive

# Options of the command, and the arguments of transformers' server.
OPTIONS = {
    "host": "host",
    "port": "port",
    "device": "device",
    "dtype": "dtype",
    "num_blocks": "cb_num_blocks",
    "max_batch_tokens": "cb_max_batch_tokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``flexmoba serve``."""
    parser.add_argument("model", help="folder of a model that convert has converted")
    parser.add_argument("--host", default="localhost", help="address (default: %(default)s)")
    parser.add_argument("--port", type=positive, default=8000, help="port (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--dtype", default="auto", help="dtype of the model (default: its own)")
    parser.add_argument(
        "--num-blocks", type=positive, help="blocks in the cache (default: by the free memory)"
    )
    parser.add_argument(
        "--max-batch-tokens", type=positive, help="tokens of a batch (default: by the free memory)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C; returns 0."""
    given = {name: getattr(arguments, name) for name in OPTIONS}
    options = {OPTIONS[name]: value for name, value in given.items() if value is not None}
    try:
        transformers = importlib.import_module("flexmoba.integrations.transformers")
        transformers.serve(arguments.model, **options)
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0
