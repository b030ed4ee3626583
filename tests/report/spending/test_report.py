"""What a run of the dynamic router's stage shows of what it learned."""

import csv
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.data import TextDataModule
from flextron_lit.data.loader import in_order
from tests.report.spending.conftest import DOMAINS
from tests.report.spending.texts import Page

BLOCKS = 6


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_domain_has_the_widths_of_every_block_at_every_budget(run_folder):
    found = rows(run_folder / "widths_by_domain.csv")
    assert {(r["router"], r["domain"]) for r in found} == {
        (router, domain) for router in ("dynamic0.80", "dynamic0.70") for domain in DOMAINS
    }
    assert len(found) == 2 * len(DOMAINS) * BLOCKS
    assert all(0 <= float(row["width"]) <= 1 for row in found)
    of = {(r["router"], r["domain"]): float(r["width"]) for r in found if (r["layer"], r["kind"]) == ("2", "mlp")}
    assert len(set(of.values())) > 1


def test_token_classes_add_up_to_all_tokens_at_the_middle_budget(run_folder):
    found = rows(run_folder / "token_classes.csv")
    assert {row["router"] for row in found} == {"dynamic0.70"}
    for domain in ("all", *DOMAINS):
        own = {row["group"]: row for row in found if row["domain"] == domain}
        classes = [row for name, row in own.items() if name != "all" and "quarter" not in name]
        tokens = int(own["all"]["tokens"])
        assert tokens == sum(int(row["tokens"]) for row in classes) == (512 if domain != "all" else 1024)
        mean = sum(int(row["tokens"]) * float(row["cost"]) for row in classes) / tokens
        assert mean == pytest.approx(float(own["all"]["cost"]), rel=1e-4)
    assert len({row["cost"] for row in found}) > 3


def test_the_page_shows_the_validation_documents(run_folder):
    page = Page((run_folder / "compute.html").read_text(encoding="utf-8"))
    tokenizer = load_elastic(str(run_folder / "flextron")).tokenizer
    text = TextDataModule(
        DOMAINS, tokenizer=str(run_folder / "flextron"), block_size=128, validation_tokens=512, test_tokens=128
    )
    text.prepare_data()
    documents = [
        "".join(tokenizer.decode(batch["input_ids"][0]) for batch in loader) for loader in text.val_dataloader()
    ]
    assert len(page.stretches) >= len(DOMAINS)
    for stretch in page.stretches:
        assert any(stretch in document for document in documents)
    assert 2 * 190 < sum(len(stretch.encode()) for stretch in page.stretches) < 2 * 230
    assert len({tuple(span["classes"]) for span in page.spans}) > 2


def test_figures_are_in_the_folder_and_in_tensorboard_at_every_validation(run_folder):
    for name in ("widths_by_domain.png", "token_classes.png"):
        assert (run_folder / name).stat().st_size > 10_000
    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = {"router/widths_by_domain", "router/token_classes", *(f"router/compute/{name}" for name in DOMAINS)}
    assert tags <= set(events.Tags()["images"])
    for tag in tags:
        assert [event.step for event in events.Images(tag)] == [0, 6]


def test_the_report_draws_no_random_number():
    text = TextDataModule(DOMAINS, tokenizer="random:configs/models/tiny-llama", block_size=64, validation_tokens=256)
    text.prepare_data()
    for loader in text.val_dataloader():
        torch.manual_seed(0)
        ours, state = list(in_order(loader)), torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(state, torch.get_rng_state())
        theirs = list(loader)
        assert not torch.equal(state, torch.get_rng_state()), "the loader draws none either: nothing is tested"
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_flextron_checkpoint_is_complete(run_folder):
    record = json.loads((run_folder / "flextron/flextron.json").read_text())
    assert record["history"][-1]["stage"] == "DynamicRouterTraining"
