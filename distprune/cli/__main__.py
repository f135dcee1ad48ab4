"""``python -m distprune.cli`` is the same as ``distprune``."""

import sys

from distprune.cli import main

sys.exit(main())
