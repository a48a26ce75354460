"""Runs the command line program for ``python -m flexmoba``."""

import sys

from flexmoba.commands import main

sys.exit(main())
