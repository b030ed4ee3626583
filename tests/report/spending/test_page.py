import re
from dataclasses import replace

import pytest
import torch

from flextron_lit.report.spending.page import page
from flextron_lit.report.spending.shades import DARK, INK_ON_DARK, INK_ON_LIGHT, LEVELS, LIGHT, Scale
from flextron_lit.report.spending.token_groups import groups_of
from tests.report.spending.texts import HARD, Page, byte_tokenizer, routed_text


def read(texts, router="dynamic0.70"):
    html = page(texts, groups_of(texts), router, "flops")
    return Page(html), html


def level(span):
    (found,) = [int(name[1:]) for name in span["classes"] if re.fullmatch(r"c\d", name)]
    return found


def test_the_page_says_the_text_and_nothing_else():
    read_page, _ = read({"stories": routed_text(HARD), "reports": routed_text("\n\nIt ends.\n")})
    assert read_page.stretches == [HARD, "\n\nIt ends.\n"]


def test_what_follows_elsewhere_is_a_stretch_of_its_own():
    text = routed_text("one two")
    pieces = [replace(piece, cut=piece.start in (0, 4)) for piece in text.pieces]
    read_page, _ = read({"x": replace(text, pieces=pieces)})
    assert read_page.stretches == ["one ", "two"]


def test_it_needs_nothing_from_elsewhere_and_runs_nothing():
    read_page, html = read({"<script>alert(1)</script>": routed_text(HARD)}, router='"><script>')
    assert not read_page.addresses
    assert not read_page.tags & {"script", "link", "img", "iframe"}
    assert "url(" not in html
    assert "@import" not in html
    assert '<meta charset="utf-8">' in html
    assert "prefers-color-scheme:dark" in html


def test_shades_rise_with_cost():
    text = routed_text("abcdefghijklmnopqrstuvwxyz" * 4)
    read_page, _ = read({"x": text})
    levels = [level(span) for span in read_page.spans]
    assert levels == sorted(levels)
    assert set(levels) == set(range(LEVELS))
    # negative control: they are of the costs, not of the places
    turned, _ = read({"x": replace(text, cost=text.cost.flip(0))})
    assert [level(span) for span in turned.spans] == levels[::-1]


def test_a_token_says_its_numbers():
    read_page, _ = read({"x": routed_text("ab", cost=[0.4, 0.8], loss=[1.25, float("nan")])})
    assert read_page.spans[0]["title"].split("\n") == [
        "word start",
        "cost 0.400",
        "MLP width 20%",
        "attention width 10%",
        "loss of the next token 1.25 nats (full network 2.25)",
    ]
    assert "loss" not in read_page.spans[1]["title"]


def test_tokens_of_one_character_share_a_shade():
    read_page, _ = read({"x": routed_text("世", cost=[0.3, 0.6, 0.9])})
    (span,) = read_page.spans
    assert span["text"] == "世"
    assert span["title"].startswith("word start, 3 tokens (means)\ncost 0.600")


def test_a_line_break_and_a_special_token_are_told_apart():
    tokenizer = byte_tokenizer()
    read_page, _ = read({"x": routed_text(f"a\n{tokenizer.eos_token}")})
    assert ["line" in span["classes"] for span in read_page.spans] == [False, True, False]
    assert ["special" in span["classes"] for span in read_page.spans] == [False, False, True]


def test_the_table_has_the_means():
    read_page, _ = read({"x": routed_text("ab", cost=[0.4, 0.8])})
    rows = [read_page.cells[i : i + 7] for i in range(0, len(read_page.cells), 7)]
    assert rows[0][:5] == ["all", "2", "0.600", "30%", "15%"]
    assert [row[0] for row in rows[1:3]] == ["word start", "word continuation"]


def test_one_odd_token_does_not_fade_the_others_and_small_differences_are_not_blown_up():
    costs = torch.cat([torch.linspace(0.5, 0.7, 99), torch.tensor([5.0])])
    scale = Scale.of([costs])
    assert scale.high < 0.71
    assert scale.level(5.0) == LEVELS - 1
    assert scale.level(0.0) == 0
    alike = Scale.of([torch.tensor([0.700, 0.701, 0.702])])
    assert {alike.level(cost) for cost in (0.700, 0.701, 0.702)} == {LEVELS // 2}
    assert alike.start(LEVELS - 1) > alike.start(0)


def luminance(colour):
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("shades", "ink", "rising"), [(LIGHT, INK_ON_LIGHT, False), (DARK, INK_ON_DARK, True)])
def test_shades_differ_in_lightness_and_text_on_them_is_legible(shades, ink, rising):
    lightness = [luminance(shade) for shade in shades]
    assert len(shades) == LEVELS
    assert lightness == sorted(lightness, reverse=not rising)
    assert len(set(lightness)) == LEVELS
    for each in lightness:
        low, high = sorted((each, luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
