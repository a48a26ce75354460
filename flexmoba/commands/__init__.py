"""The command line program ``flexmoba`` and its commands."""

from flexmoba.commands.cli import main

__all__ = ["main"]
