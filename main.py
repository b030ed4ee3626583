"""The front door. `python main.py` alone lists the commands."""

import sys

from flextron_lit.commands import main

if __name__ == "__main__":
    sys.exit(main())
