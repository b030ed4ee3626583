"""`python -m flextron_lit`, the same as `python main.py`."""

import sys

from flextron_lit.commands import main

if __name__ == "__main__":
    sys.exit(main())
