"""`python -m distml`: the same as the command `distml`."""

import sys

from distml.cli import main

if __name__ == "__main__":
    sys.exit(main())
