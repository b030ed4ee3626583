"""A text coloured by what a dynamic router spends on each token, as one web page that needs nothing else."""

import math
from collections.abc import Mapping, Sequence

from flextron_lit.report.rendering import render
from flextron_lit.report.spending.routed_text import RoutedText
from flextron_lit.report.spending.shades import DARK, INK_ON_DARK, INK_ON_LIGHT, LEVELS, LIGHT, Scale
from flextron_lit.report.spending.token_groups import ALL, Group
from flextron_lit.report.spending.token_pieces import Piece


def page(texts: Mapping[str, RoutedText], groups: Sequence[Group], router: str, cost: str) -> str:
    """The page, as HTML in UTF-8 without scripts.

    Args:
        texts: by domain, or name of a file: what is shown.
        groups: means over the tokens of a text that may be longer, as `groups_of` gives them; those of all domains
            are shown.
        router: what to call it.
        cost: what is counted.
    """
    scale = Scale.of([text.cost for text in texts.values()])
    return render(
        "spending/compute.html",
        title=f"Compute: {router}",
        router=router,
        cost=cost,
        texts=[(name, text, _stretches(text, scale)) for name, text in texts.items()],
        rows=[group.cells() for group in groups if group.domain == ALL],
        starts=[scale.start(level) for level in range(LEVELS)],
        light=LIGHT,
        dark=DARK,
        ink_on_light=INK_ON_LIGHT,
        ink_on_dark=INK_ON_DARK,
    )


def _stretches(text: RoutedText, scale: Scale) -> list[list[dict[str, str]]]:
    stretches: list[list[dict[str, str]]] = []
    for piece in text.pieces:
        if piece.cut:
            stretches.append([])
        stretches[-1].append(_span(text, piece, scale))
    return stretches


def _span(text: RoutedText, piece: Piece, scale: Scale) -> dict[str, str]:
    """What the page says of a piece: its shade, its numbers a line each, itself."""
    means, tokens = text.means(piece), piece.stop - piece.start
    classes = [f"c{scale.level(means['cost'])}"]
    classes += ["line"] if piece.text.startswith(("\n", "\r")) else []
    classes += ["special"] if piece.special else []
    lines = [
        text.classes[piece.start] + (f", {tokens} tokens (means)" if tokens > 1 else ""),
        f"cost {means['cost']:.3f}",
        f"MLP width {means['mlp_width']:.0%}",
        f"attention width {means['attention_width']:.0%}",
    ]
    if not math.isnan(means["loss"]):
        lines.append(f"loss of the next token {means['loss']:.2f} nats (full network {means['full_loss']:.2f})")
    return {"classes": " ".join(classes), "title": "\n".join(lines), "text": piece.text}
