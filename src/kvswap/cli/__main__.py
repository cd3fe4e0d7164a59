"""``python -m kvswap.cli`` is ``kvswap``."""

import sys

from kvswap.cli import main

sys.exit(main())
