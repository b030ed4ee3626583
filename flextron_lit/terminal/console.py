"""How commands print: rich tables of plain text, numbers that can be read."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MINIMUM_WIDTH = 100
ENDLESS = 100_000


def two_columns(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A table of names and what there is to say about each."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] = (), **settings: Any) -> Table:
    """A table whose cells are never broken.

    Args:
        columns: their heads.
        rows: cells.
        left: heads of the columns that hold words, and not numbers.
        settings: of rich's table, such as a title.
    """
    made = Table(**settings)
    for column in columns:
        made.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def show(*tables: Table | str) -> None:
    """Print tables and lines, wide enough for a log, and for what a table holds: no cell is cut."""
    # brackets and colons in paths and widths are text, not markup
    console = Console(markup=False, emoji=False, highlight=False)
    width = max(console.width, MINIMUM_WIDTH)
    for table in tables:
        console.width = width if isinstance(table, str) else max(width, _needed(console, table))
        console.print(table, soft_wrap=isinstance(table, str))


def _needed(console: Console, table: Table) -> int:
    """Characters a line that a table cannot do without."""
    found = Measurement.get(console, console.options.update(max_width=ENDLESS), table)
    return found.maximum if all(column.no_wrap for column in table.columns) else found.minimum


def short(count: int) -> str:
    """A count at a glance: 134.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """At a glance: 48 s, 2 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def huge(count: int) -> str:
    """A count that may have hundreds of digits."""
    digits = str(count)
    return f"{count:,}" if len(digits) <= 9 else f"about {digits[0]}.{digits[1]}e{len(digits) - 1}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: 0, 3-5."""
    runs: list[list[int]] = [[numbers[0], numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def settings(values: Mapping[str, Any], key: str = "") -> Iterator[str]:
    """Nested settings, a line for each level of nesting."""
    inner = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    line = ", ".join(f"{name} {value}" for name, value in values.items() if name not in inner)
    if line:
        yield f"{key}: {line}" if key else line
    for name, value in inner.items():
        yield from settings(value, f"{key}.{name}" if key else name)


def end_with_the_reader() -> None:
    """Let `| head` end a command that only prints, quietly, as other tools do."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def about(command: Callable[..., Any]) -> dict[str, Any]:
    """What the parser of a command says of it: the name of its file, and its own docstring."""
    name = command.__module__.rpartition(".")[2]
    return {"prog": f"main.py {name}", "description": " ".join(f"{command.__doc__}".split())}
