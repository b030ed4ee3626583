"""Losses of what is watched, and reports of them: sub-networks, and routers whose cost depends on the text."""

import csv
import json
import math

import pytest
import torch
from lightning.pytorch import Trainer

from flextron_lit.costs import CostTable
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.data.domain import shown_names
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter
from flextron_lit.routers.ladder import Ladder, Rung
from flextron_lit.space import SpaceConfig, SubNetwork, resolve
from flextron_lit.stages.loss_history import Report
from flextron_lit.stages.validation import LossTable, ValidationResult, ValidationSet, Watched
from flextron_lit.stages.watched_losses import ladder_answers
from tests.stages import training

SPACE = resolve(SpaceConfig(mlp=[0, 32, 64], attention=[1, 2, 4]), num_layers=1, neurons=64, kv_groups=4)
COSTS = CostTable("units", "units", 10.0, ((1.0, 2.0, 4.0), (0.0, 3.0, 6.0)))
# dynamic routing costs something itself, and ratios are of the full network without it
ROUTED = CostTable("units", "units", 12.0, ((1.0, 2.0, 4.0), (0.0, 3.0, 6.0)), reference=20.0)
DOMAINS = ["easy", "hard"]


def policy():
    return DynamicPolicy(DynamicRouter(SPACE, 4, torch.tensor([0.0, 1.0])), ROUTED, [0.7], [0.0])


def watched():
    return {
        "full": Watched(SPACE.full(), COSTS),
        "mlp50": Watched(SubNetwork((2, 1)), COSTS),
        "dynamic0.70": Watched(policy(), ROUTED),
    }


def result(seen=None):
    """Two batches a domain: the router gives hard tokens more."""
    watching = seen or watched()
    losses = LossTable(len(watching), len(DOMAINS), SPACE)
    for index, each in enumerate(watching.values()):
        for domain, (total, tokens) in enumerate([(20.0, 10), (60.0, 20)]):
            for batch in (1, 3):
                if isinstance(each.selection, DynamicPolicy):
                    # easy: one in four tokens takes all of the MLP; hard: three in four
                    wide = 1 if domain == 0 else 3
                    each.selection.note(0, [0, 0, 4 * batch])
                    each.selection.note(1, [batch * (4 - wide), 0, batch * wide])
                losses.update(
                    index, domain, torch.tensor(batch * total), torch.tensor(batch * tokens), each.took(SPACE)
                )
    return ValidationResult(SPACE, watching, DOMAINS, *losses.compute())


def test_losses_are_weighted_by_tokens_and_shares_by_choices():
    found = result()
    assert found.losses.tolist() == [[2.0, 3.0]] * 3
    assert found.mean_loss == 2.5
    assert torch.equal(found.shares[0, 0], SPACE.one_hot(SPACE.full()).double())
    assert torch.equal(found.shares[1, 1], SPACE.one_hot(SubNetwork((2, 1))).double())
    wanted = torch.tensor([[[0, 0, 1], [0.75, 0, 0.25]], [[0, 0, 1], [0.25, 0, 0.75]]], dtype=torch.float64)
    assert torch.equal(found.shares[2], wanted)


def test_what_a_router_costs_depends_on_the_text():
    metrics = result().metrics("val")
    assert metrics["val/dynamic0.70/easy/cost"] == pytest.approx((12 + 4 + 1.5) / 20)
    assert metrics["val/dynamic0.70/hard/cost"] == pytest.approx((12 + 4 + 4.5) / 20)
    assert metrics["val/dynamic0.70/mean/loss"] == 2.5
    assert metrics["val/full/easy/perplexity"] == pytest.approx(math.exp(2))
    # that of a sub-network does not, and is no metric
    assert [name for name in metrics if name.endswith("/cost")] == [
        "val/dynamic0.70/easy/cost",
        "val/dynamic0.70/hard/cost",
    ]


def test_rows_have_the_mean_widths_and_costs_of_every_domain():
    rows = {(row["sub_network"], row["domain"]): row for row in result().rows(7)}
    assert len(rows) == 6
    assert all(row["step"] == 7 for row in rows.values())
    assert [rows["full", domain]["units"] for domain in DOMAINS] == [20.0, 20.0]
    assert [rows["mlp50", domain]["units"] for domain in DOMAINS] == [17.0, 17.0]
    assert [rows["dynamic0.70", domain]["units"] for domain in DOMAINS] == [17.5, 20.5]
    assert [rows["dynamic0.70", domain]["mlp_width"] for domain in DOMAINS] == [0.25, 0.75]
    assert rows["dynamic0.70", "hard"]["attention_width"] == 1.0
    assert rows["mlp50", "easy"]["mlp_width"] == 0.5
    json.dumps(list(rows.values()))


def test_costs_of_two_tables_have_one_scale():
    # measured in other minutes of the machine, in which all took twice as long
    slow = CostTable("units", "units", 24.0, ((2.0, 4.0, 8.0), (0.0, 6.0, 12.0)), reference=40.0)
    router = DynamicPolicy(DynamicRouter(SPACE, 4, torch.tensor([0.0, 1.0])), slow, [0.7], [0.0])
    same, other = (
        result({**watched(), "dynamic0.70": each}).rows(0) for each in (watched()["dynamic0.70"], Watched(router, slow))
    )
    assert same == other
    assert [row["cost_ratio"] for row in other if row["domain"] == "easy"] == [1.0, 0.85, 0.875]
    assert all(row["units"] == pytest.approx(20.0 * row["cost_ratio"]) for row in other)


def test_a_router_is_asked_once_for_what_it_took():
    watching = watched()
    router = watching["dynamic0.70"]
    router.selection.note(1, [1, 0, 0])
    assert router.took(SPACE).sum() == 1
    assert router.took(SPACE).sum() == 0
    full = watching["full"]
    assert torch.equal(full.took(SPACE), full.took(SPACE))


def test_what_was_not_seen_has_no_loss():
    table = LossTable(2, 2, SPACE)
    table.update(0, 1, torch.tensor(6.0), torch.tensor(2), SPACE.one_hot(SPACE.full()))
    losses, shares = table.compute()
    assert losses.isnan().tolist() == [[True, False], [True, True]]
    assert shares.sum((-2, -1)).tolist() == [[0, 2], [0, 0]]


def test_what_is_no_number_is_infinite_and_what_was_not_seen_does_not_count():
    table = LossTable(2, 3, SPACE)
    one_hot = SPACE.one_hot(SPACE.full())
    for sub_network, domain, total in [(0, 0, 6.0), (1, 0, 10.0), (0, 1, 4.0), (1, 1, math.nan)]:
        table.update(sub_network, domain, torch.tensor(total), torch.tensor(2), one_hot)
    losses, shares = table.compute()
    assert losses[:, 0].tolist() == [3.0, 5.0]
    assert losses[:, 1].tolist() == [2.0, math.inf]
    assert losses[:, 2].isnan().all()
    names = [name for name in watched() if name != "dynamic0.70"]
    seen = {name: watched()[name] for name in names}
    assert ValidationResult(SPACE, seen, ["a", "b", "c"], losses, shares).mean_loss == math.inf
    whole = ValidationResult(SPACE, seen, ["a", "c"], losses[:, [0, 2]], shares[:, [0, 2]])
    assert whole.mean_loss == 4.0


def test_a_rank_without_blocks_takes_its_turn_with_nothing():
    stage = training.stage()
    stage.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert stage.validation_step(None, 0) is None
    assert stage.test_step(None, 0, 0) is None
    assert stage.predict_step(None, 0) == {}


def test_a_report_shows_routers_by_their_mean_cost_on_a_line_of_their_own(tmp_path, capsys):
    report = Report(tmp_path, "training", append=False)
    report.add(0, result())
    report.add(5, result())
    assert report.costs() == {"full": 20.0, "mlp50": 17.0, "dynamic0.70": 19.0}
    labels = [text.get_text() for text in report.figure().axes[0].get_legend().get_texts()]
    assert labels == ["step 0", "dynamic, step 0", "step 5", "dynamic, step 5"]
    assert len(report.figure().axes[0].lines) == 4
    between = Report(tmp_path, "between", append=False)
    for step in (0, 3, 5):
        between.add(step, result())
    assert len(between.figure().axes[0].lines) == 6
    assert [text.get_text() for text in between.figure().axes[0].get_legend().get_texts()] == labels
    (line,) = [line for line in report.figure().axes[0].lines if line.get_label() == "dynamic, step 5"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([19.0], [2.5])
    with (tmp_path / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["units"] for row in rows if row["sub_network"] == "dynamic0.70"] == ["17.5", "20.5"] * 2
    report.show()
    shown = next(line for line in capsys.readouterr().out.splitlines() if "dynamic0.70" in line)
    assert [cell for cell in shown.split() if cell[0].isdigit()] == ["19", "2.000", "3.000", "2.500"]
    # and it goes on with what another process wrote
    again = Report(tmp_path, "training", append=True)
    assert again.rows == report.rows


def test_the_full_network_alone_on_one_domain_is_a_table_too():
    alone = training.stage(validation=ValidationSet(uniform=[], random_costs=[]))
    training.fit(alone, training.Plan(), limit_val_batches=1)
    assert alone.result.losses.shape == (1, 1)
    assert math.isfinite(alone.result.mean_loss)


# --- names ------------------------------------------------------------------------------------------------------


def test_a_domain_that_is_called_as_something_else_in_tables_has_another_name_there():
    names = ["mean", "hard", "budget", "domain_mean", "all texts"]
    shown = shown_names(names)
    assert shown == ["domain_mean_", "hard", "domain_budget", "domain_mean", "domain_all texts"]
    assert TextDataModule(dict.fromkeys(names, TextDomain(source="generated:9"))).shown_names == shown
    found = result()
    mean = ValidationResult(SPACE, found.watched, shown_names(["mean", "hard"]), found.losses, found.shares)
    metrics = mean.metrics("val")
    assert metrics["val/full/domain_mean/loss"] == 2.0
    assert metrics["val/full/mean/loss"] == 2.5


def test_a_table_shows_a_domain_called_mean_beside_the_mean(tmp_path):
    found = result()
    named = ValidationResult(SPACE, found.watched, shown_names(["mean", "hard"]), found.losses, found.shares)
    report = Report(tmp_path, "validation", append=False)
    report.add(0, named)
    assert report.losses(0)["full"] == {"domain_mean": 2.0, "hard": 3.0, "mean": 2.5}


def test_two_budgets_never_share_a_name():
    table = CostTable("units", "units", 10.0, ((1.0, 2.0, 4.0), (0.0, 3.0, 6.0)))
    rungs = [Rung(table.cost(each), 2.0, each) for each in (SPACE.smallest(), SPACE.full())]
    answers = ladder_answers(Ladder(tuple(rungs)), table, [0.701, 0.704, 0.9, 0.9, 1.0])
    assert list(answers) == ["routed0.701", "routed0.704", "routed0.90", "routed1.00"]
