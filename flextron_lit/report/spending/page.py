"""A text coloured by what a dynamic router spends on each token, as one web page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from torch import Tensor

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
    body = [
        f"<h1>Where the compute goes: {escape(router)}</h1>",
        f"<p>Each token is shaded by its share of the full network's {escape(cost)}. Point at one for its numbers. "
        "What a token gets serves the prediction of the token that follows, so losses are of that one.</p>",
        _legend(scale),
    ]
    for name, text in texts.items():
        spent = f"{len(text)} tokens, mean {float(text.cost.mean()):.3f}"
        body += [f"<h2>{escape(name)} <small>{spent}</small></h2>", _shaded(text, scale)]
    body += [_table(groups, cost)]
    return _document(f"Compute: {router}", body)


def _document(title: str, body: Iterable[str]) -> str:
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_style()}</style></head>",
            "<body>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def _shaded(text: RoutedText, scale: Scale) -> str:
    """An element a stretch of text."""
    stretches: list[list[str]] = []
    for piece in text.pieces:
        if piece.cut:
            stretches.append([])
        stretches[-1].append(_span(text, piece, scale))
    # shown as it is: no translation, direction by its own letters
    return "\n".join(f'<div class="text" lang="" translate="no" dir="auto">{"".join(each)}</div>' for each in stretches)


def _span(text: RoutedText, piece: Piece, scale: Scale) -> str:
    classes = [f"c{scale.level(_mean(text.cost, piece))}"]
    classes += ["line"] if piece.text.startswith(("\n", "\r")) else []
    classes += ["special"] if piece.special else []
    return f'<span class="{" ".join(classes)}" title="{_title(text, piece)}">{_escaped(piece.text)}</span>'


def _title(text: RoutedText, piece: Piece) -> str:
    """The numbers of a piece, a line each."""
    tokens = piece.stop - piece.start
    lines = [
        text.classes[piece.start] + (f", {tokens} tokens (means)" if tokens > 1 else ""),
        f"cost {_mean(text.cost, piece):.3f}",
        f"MLP width {_mean(text.mlp_width, piece):.0%}",
        f"attention width {_mean(text.attention_width, piece):.0%}",
    ]
    loss, full_loss = _mean(text.loss, piece), _mean(text.full_loss, piece)
    if not math.isnan(loss):
        lines.append(f"loss of the next token {loss:.2f} nats (full network {full_loss:.2f})")
    return "&#10;".join(escape(line) for line in lines)


def _mean(values: Tensor, piece: Piece) -> float:
    return float(values[piece.start : piece.stop].nanmean())


def _escaped(text: str) -> str:
    # a bare carriage return would be read as a line feed
    return escape(text, quote=False).replace("\r", "&#13;")


def _legend(scale: Scale) -> str:
    swatches = (f'<span class="c{level}">{scale.start(level):.2f}</span>' for level in range(LEVELS))
    return f'<p class="legend">cost {"".join(swatches)} and more</p>'


def _table(groups: Sequence[Group], cost: str) -> str:
    head = (
        "tokens",
        "count",
        f"cost ({cost})",
        "MLP width",
        "attention width",
        "loss of the next token",
        "the full network's",
    )
    return "\n".join(
        [
            "<h2>By class of token</h2>",
            '<div class="scroll"><table>',
            f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>",
            *_rows(groups),
            "</table></div>",
        ]
    )


def _rows(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        if group.domain == ALL:
            means = group.means
            cells = [group.name, str(group.tokens), f"{means['cost']:.3f}"]
            cells += [f"{means[name]:.0%}" for name in ("mlp_width", "attention_width")]
            cells += ["" if math.isnan(means[name]) else f"{means[name]:.2f}" for name in ("loss", "full_loss")]
            yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _style() -> str:
    def shades(colours: Sequence[str]) -> str:
        return "".join(f".c{level}{{background:{colour}}}" for level, colour in enumerate(colours))

    return (
        ":root{color-scheme:light dark;--page:#fff;--ink:" + INK_ON_LIGHT + ";--faint:#595959;--rule:#d0d0d0}"
        "body{margin:2rem auto;max-width:60rem;padding:0 1rem;background:var(--page);color:var(--ink);"
        "font:1rem/1.5 system-ui,sans-serif}"
        "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}small{color:var(--faint);"
        "font-weight:normal}"
        ".text+.text{margin-top:.8rem}.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.8}"
        ".text span,.legend span{border-radius:.2rem;padding:.1rem 0;print-color-adjust:exact;"
        "-webkit-print-color-adjust:exact}"
        ".text span:hover{outline:.1rem solid var(--ink)}"
        ".legend{position:sticky;top:0;background:var(--page);padding:.5rem 0}"
        ".legend span{padding:.2rem .6rem;border-radius:0}"
        # a line break has no width to colour; the sign is no part of the text
        '.line::before{content:"↵"}.special{font-size:.75em}'
        ".scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid var(--rule)}"
        "th:first-child,td:first-child{text-align:left;white-space:nowrap}"
        + shades(LIGHT)
        + "@media(prefers-color-scheme:dark){:root{--page:#161616;--ink:"
        + INK_ON_DARK
        + ";--faint:#a8a8a8;--rule:#444}"
        + shades(DARK)
        + "}"
    )
