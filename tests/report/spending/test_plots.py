import warnings

import pytest
import torch
from matplotlib.colors import to_hex

from flextron_lit.report.spending.plots import COLUMNS, MISSING, cost_by_group, shaded_text, widths_by_domain
from flextron_lit.report.spending.shades import LIGHT, Scale
from flextron_lit.report.spending.token_groups import groups_of
from flextron_lit.space import SpaceConfig, resolve
from tests.report.spending.texts import HARD, routed_text, whole

SPACE = resolve(SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]), num_layers=3, neurons=64, kv_groups=4)


def drawn(figure):
    """Render it: a missing glyph or a formula that cannot be read would show."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    return figure


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_heat_maps_show_every_layer_of_every_domain_and_budget():
    widths = {"0.80": torch.rand(2, 6), "0.60": torch.rand(2, 6)}
    figure = drawn(widths_by_domain(widths, ["stories", "reports"], SPACE))
    attention, mlp, *differences = [axes for axes in figure.axes if axes.get_ylabel() == "layer"]
    for axes, offset in ((attention, 0), (mlp, 1)):
        shown = torch.as_tensor(axes.collections[0].get_array())
        expected = torch.stack([widths[b][d, offset::2] for b in widths for d in range(2)], 1)
        assert torch.allclose(shown.float(), expected)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["stories", "reports"] * 2
    assert [text.get_text() for text in attention.texts] == ["0.80", "0.60"]
    for axes in differences:
        shown = torch.as_tensor(axes.collections[0].get_array())
        assert torch.allclose(shown[:, 0], -shown[:, 1], atol=1e-6)
        low, high = axes.collections[0].get_clim()
        assert -low == high >= float(shown.abs().max())


def test_one_domain_is_compared_with_nothing():
    figure = drawn(widths_by_domain({"0.80": torch.rand(1, 6)}, ["stories"], SPACE))
    assert sum(axes.get_ylabel() == "layer" for axes in figure.axes) == 2


def test_bars_begin_at_the_mean_of_all_tokens():
    texts = {"x": routed_text("ab 1", cost=[0.9, 0.5, 0.4, 0.8]), "y": routed_text("ab", cost=[0.9, 0.5])}
    figure = drawn(cost_by_group(groups_of(texts), "dynamic0.70", "flops"))
    bars = {
        label.get_text(): (bar.get_x(), bar.get_x() + bar.get_width())
        for label, bar in zip(figure.axes[0].get_yticklabels(), figure.axes[0].patches, strict=True)
    }
    mean = sum([0.9, 0.5, 0.4, 0.8, 0.9, 0.5]) / 6
    assert bars["word start (2)"] == pytest.approx((mean, 0.9))
    assert bars["whitespace (1)"] == pytest.approx((mean, 0.4))


def test_a_text_is_drawn_shaded_and_dollars_are_dollars():
    text = routed_text("$a_1$ costs $5\n\tx", cost=[0.4] * 9 + [0.9] * 8)
    scale = Scale.of([text.cost])
    figure = drawn(shaded_text(text, scale, "title"))
    said = words(figure)
    assert said[:2] == ["title", "cost"]
    assert "".join(said[2:])[: len(whole(text)) + 3] == "$a_1$ costs $5↵    x"
    colours = [to_hex(colour) for colour in figure.axes[0].collections[0].get_facecolors()]
    assert colours[0] == LIGHT[0]
    assert colours[len(text.pieces) - 1] == LIGHT[-1]


def test_what_the_font_lacks_is_a_box_and_long_lines_are_broken():
    figure = drawn(shaded_text(routed_text(HARD), Scale(0, 1), ""))
    assert MISSING in words(figure)
    assert "к" in words(figure)
    long = drawn(shaded_text(routed_text("x" * (2 * COLUMNS + 1)), Scale(0, 1), ""))
    places = [text.get_position() for text in long.axes[0].texts if text.get_text() == "x"]
    assert max(column for column, _ in places) == COLUMNS - 1
    assert len({row for _, row in places}) == 3
