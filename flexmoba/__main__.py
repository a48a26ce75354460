"""The command line, as ``python -m flexmoba``."""

import sys

from flexmoba.commands import main

sys.exit(main())
