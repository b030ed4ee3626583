import math

import pytest

from flextron_lit.report.spending.token_groups import QUARTERS, groups_of, summary
from tests.report.spending.texts import routed_text

NAN = float("nan")


def means(groups, name, domain="all"):
    (group,) = [g for g in groups if (g.domain, g.name) == (domain, name)]
    return group.means


def test_means_are_of_the_tokens_of_a_class():
    text = routed_text("ab 1", cost=[0.9, 0.5, 0.4, 0.8], loss=[1.0, 2.0, NAN, 4.0])
    groups = groups_of({"x": text})
    assert [g.name for g in groups if g.domain == "all"][:5] == [
        "all",
        "word start",
        "word continuation",
        "number",
        "whitespace",
    ]
    assert means(groups, "all")["cost"] == pytest.approx(0.65)
    assert means(groups, "word start")["cost"] == pytest.approx(0.9)
    assert means(groups, "number")["mlp_width"] == pytest.approx(0.4)
    assert means(groups, "number")["attention_width"] == pytest.approx(0.2)
    assert means(groups, "all")["loss"] == pytest.approx(7 / 3)
    assert math.isnan(means(groups, "whitespace")["loss"])
    assert means(groups, "number")["full_loss"] == pytest.approx(5)
    assert groups[0].row()["tokens"] == 4


def test_quarters_are_by_the_full_networks_loss_over_all_domains():
    easy = routed_text("abcd", cost=[0.4] * 4, loss=[1.0, 2.0, 3.0, 4.0])
    hard = routed_text("abcd", cost=[0.8] * 4, loss=[NAN, 6.0, 7.0, 8.0])
    groups = groups_of({"easy": easy, "hard": hard})
    sizes = {g.name: g.tokens for g in groups if g.domain == "all" and g.name in QUARTERS}
    assert list(sizes) == list(QUARTERS)
    assert sum(sizes.values()) == 7, "a token without a loss is in none"
    assert means(groups, QUARTERS[0])["cost"] == pytest.approx(0.4)
    assert means(groups, QUARTERS[-1])["cost"] == pytest.approx(0.8)
    assert [g.name for g in groups if g.domain == "easy" and g.name in QUARTERS] == list(QUARTERS[:2])


def test_without_losses_there_are_no_quarters():
    groups = groups_of({"x": routed_text("ab", cost=[0.4, 0.6], loss=[NAN, NAN])})
    assert [g.name for g in groups if g.domain == "all"] == ["all", "word start", "word continuation"]
    assert summary(groups, "r", "flops").endswith("most on word continuation (0.600), least on word start (0.400)")


def test_the_summary_names_what_gets_most_and_least():
    text = routed_text("ab 1", cost=[0.9, 0.5, 0.4, 0.8], loss=[1.0, 2.0, 3.0, 4.0])
    said = summary(groups_of({"x": text}), "dynamic0.70", "flops")
    assert said.startswith(
        "dynamic0.70 spends 0.650 of the full network's flops on a token: most on word start (0.900)"
    )
    assert "least on whitespace (0.400)" in said
    assert said.endswith("0.800 where the next token is hard to predict, 0.900 where it is easy")


def test_no_difference_is_called_none():
    said = summary(groups_of({"x": routed_text("ab 1", cost=[0.7, 0.701, 0.702, 0.7])}), "r", "flops")
    assert "about the same on every class" in said
    assert "most on" not in said


def test_a_class_of_a_few_tokens_is_not_named():
    words = "ab " * 100
    costs = [0.5, 0.6, 0.7] * 100
    said = summary(groups_of({"x": routed_text(words + "!", cost=[*costs, 1.0])}), "r", "flops")
    assert "most on whitespace (0.700)" in said
    often = summary(groups_of({"x": routed_text(words + "!" * 9, cost=[*costs, *[1.0] * 9])}), "r", "flops")
    assert "most on punctuation (1.000)" in often
