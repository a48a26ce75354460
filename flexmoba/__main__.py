"""``python -m flexmoba``."""

import sys

from flexmoba.cli import main

sys.exit(main())
