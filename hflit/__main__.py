"""`python -m hflit` is the program `hflit`."""

import sys

from hflit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
