"""`python -m cm_export` is the command `cm-export`, where its script is not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
