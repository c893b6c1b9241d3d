"""``python -m sadsl``: the command line."""

import sys

from sadsl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
