"""``python -m stackwise``: the command line."""

import sys

from stackwise.cli import main

if __name__ == "__main__":
    sys.exit(main())
