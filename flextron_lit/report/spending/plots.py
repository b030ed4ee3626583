"""Where a dynamic router's compute goes, as figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flextron_lit.report.spending.routed_text import RoutedText
from flextron_lit.report.spending.shades import INK_ON_LIGHT, LEVELS, LIGHT, Scale
from flextron_lit.report.spending.token_classes import TOKEN_CLASSES
from flextron_lit.report.spending.token_groups import ALL, QUARTERS, Group
from flextron_lit.space import KINDS, ElasticSpace

COLUMNS = 100
"""Characters of a line of text."""
FONT = FontProperties(family="DejaVu Sans Mono", size=8)
ADVANCE = 0.602
"""Width of its characters, as a share of their size."""
LINE = 1.7
"""Height of a line, likewise."""
FAINT = 0.05
"""Least difference between domains that has the strongest colour."""
MISSING = "□"
MARKERS = "osD^vPX*"


def widths_by_domain(widths: Mapping[str, Tensor], domains: Sequence[str], space: ElasticSpace) -> Figure:
    """Heat maps of the mean width of every layer in every domain, and how far that is from the domains' mean.

    Args:
        widths: mean shares of the full width by budget, [D, 2L] each.
        domains: D names.
        space: the choices.
    """
    # with one domain there is nothing to compare
    rows = 2 if len(domains) > 1 else 1
    columns = len(widths) * len(domains)
    figure = Figure(figsize=(4 + 0.5 * columns, 1.5 + 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, len(KINDS), squeeze=False)
    for column, kind in enumerate(KINDS):
        indices = [index for index, block in enumerate(space.blocks) if block.kind == kind]
        layers = [space.blocks[index].layer for index in indices]
        own = {name: each[:, indices] for name, each in widths.items()}
        _heat_map(panels[0][column], own, domains, layers, f"width of {kind} by budget", (0, 1, "viridis"))
        if rows > 1:
            apart = {name: each - each.mean(0) for name, each in own.items()}
            # the same colours for both kinds
            reach = max(FAINT, *(float((each - each.mean(0)).abs().max()) for each in widths.values()))
            title = f"{kind}: difference from mean"
            _heat_map(panels[1][column], apart, domains, layers, title, (-reach, reach, "PuOr_r"))
    for row, label in zip(panels, ("share of the full width", "difference of the shares"), strict=False):
        figure.colorbar(row[0].collections[0], ax=list(row), label=label)
    return figure


def _heat_map(
    axes: Axes,
    widths: Mapping[str, Tensor],
    domains: Sequence[str],
    layers: Sequence[int],
    title: str,
    colours: tuple[float, float, str],
) -> None:
    """One column a budget and domain."""
    low, high, names = colours
    columns = [row for each in widths.values() for row in each.tolist()]
    edges = [layer - 0.5 for layer in layers] + [layers[-1] + 0.5]
    values = [list(row) for row in zip(*columns, strict=True)]
    axes.pcolormesh(range(len(columns) + 1), edges, values, vmin=low, vmax=high, cmap=names)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], [*domains] * len(widths), rotation=90)
    for index, name in enumerate(widths):
        axes.axvline(index * len(domains), color="white", linewidth=3)
        place = (index + 0.5) * len(domains), 1.01
        axes.text(*place, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize="small")
    axes.set_title(title, pad=18)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()


def cost_by_group(groups: Sequence[Group], router: str, cost: str) -> Figure:
    """Mean cost by class of token and by loss of the next token, a bar from the mean of all tokens; a dot a domain."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(f"{router}: what a token gets")
    panels = figure.subplots(1, 2, sharex=True)
    domains = list(dict.fromkeys(group.domain for group in groups if group.domain != ALL))
    mean = next(group.means["cost"] for group in groups if (group.domain, group.name) == (ALL, ALL))
    spent = [group.means["cost"] for group in groups]
    kinds = ((TOKEN_CLASSES, "by class of token"), (QUARTERS, "by loss of the next token"))
    for axes, (names, title) in zip(panels, kinds, strict=True):
        shown = {group.name: group for group in groups if group.domain == ALL and group.name in names}
        places = list(shown)
        axes.barh(places, [group.means["cost"] - mean for group in shown.values()], left=mean, color=LIGHT[3])
        for domain, marker in zip(domains, cycle(MARKERS), strict=False):
            own = [group for group in groups if group.domain == domain and group.name in shown]
            axes.plot([group.means["cost"] for group in own], [g.name for g in own], marker, label=domain, alpha=0.8)
        axes.axvline(mean, linestyle="--", color="grey")
        axes.set(xlabel=f"share of the full network's {cost}", title=title)
        axes.set_yticks(range(len(places)), [f"{name} ({group.tokens})" for name, group in shown.items()])
        axes.invert_yaxis()
    margin = 0.1 * (max(spent) - min(spent)) or 0.01
    panels[0].set_xlim(min(spent) - margin, max(spent) + margin)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@dataclass(frozen=True)
class _Run:
    """Characters of one piece on one line."""

    row: int
    column: int
    text: str
    level: int


def shaded_text(text: RoutedText, scale: Scale, title: str) -> Figure:
    """A text with its tokens shaded by cost, on the light page; characters that the font lacks are boxes."""
    runs = list(_runs(text, scale))
    rows = runs[-1].row + 1
    size = FONT.get_size_in_points() / 72
    figure = Figure(figsize=((COLUMNS + 4) * ADVANCE * size, (rows + 5) * LINE * size))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(rows + 3, -2))
    axes.axis("off")
    legend = [_Run(rows + 1, 7 + 6 * level, f" {scale.start(level):.2f} ", level) for level in range(LEVELS)]
    boxes = [Rectangle((run.column, run.row), len(run.text), 1) for run in (*runs, *legend)]
    colours = [LIGHT[run.level] for run in (*runs, *legend)]
    axes.add_collection(PatchCollection(boxes, facecolors=colours))
    _write(axes, 0, -1.5, title)
    _write(axes, 0, rows + 1, "cost")
    for run in (*runs, *legend):
        _write(axes, run.column, run.row, run.text)
    return figure


def _runs(text: RoutedText, scale: Scale) -> Iterator[_Run]:
    row = column = 0
    for piece in text.pieces:
        if piece.cut and column:
            row, column = row + 1, 0
        level = scale.level(text.means(piece)["cost"])
        for line in piece.text.expandtabs(4).splitlines(keepends=True):
            shown = line.rstrip("\r\n") + ("↵" if line.endswith(("\r", "\n")) else "")
            while shown:
                part, shown = shown[: COLUMNS - column], shown[COLUMNS - column :]
                yield _Run(row, column, _drawable(part), level)
                column += len(part)
                if shown or part.endswith("↵") or column == COLUMNS:
                    row, column = row + 1, 0


def _drawable(text: str) -> str:
    known = _characters()
    return "".join(character if ord(character) in known else MISSING for character in text)


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def _write(axes: Axes, column: float, row: float, text: str) -> None:
    # a dollar sign is a dollar sign
    axes.text(column, row + 0.5, text, font=FONT, va="center_baseline", color=INK_ON_LIGHT, parse_math=False)
