"""`python -m mmdiff` is `mmdiff`."""

import sys

from mmdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
