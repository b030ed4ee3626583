"""`--quick`, which benchmarks have for a look whether all of it runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any


def parsed(made: argparse.ArgumentParser, quick: Mapping[str, Any], what: str) -> argparse.Namespace:
    """The command line, with the settings of a first look where it asks for one.

    Args:
        made: without `--quick`.
        quick: settings of a first look, which win.
        what: that does, for `--help`.
    """
    made.add_argument("--quick", action="store_true", help=what)
    options = made.parse_args()
    if options.quick:
        vars(options).update(quick)
    return options
