"""`python main.py highlight`: once as a user runs it, then in process, which is faster."""

import pytest

from flextron_lit.commands.highlight import command
from tests.front_door import fail, succeed
from tests.report.spending.texts import HARD, Page


def highlight(folder, *options):
    command(["--checkpoint", str(folder), *map(str, options)])


def page_at(path):
    return Page(path.read_text(encoding="utf-8"))


def test_a_text_file_is_shaded(run_folder, tmp_path):
    (tmp_path / "text.txt").write_bytes(HARD.encode())
    options = ("--text", tmp_path / "text.txt", "--output", tmp_path / "page.html")
    printed = succeed("highlight", "--checkpoint", run_folder, "--budget", "0.7", *options)
    assert page_at(tmp_path / "page.html").stretches == [HARD.replace("\r\n", "\n")]
    for said in ("word start", "hardest quarter", "spends 0.", "of the full network's flops", "wrote"):
        assert said in printed


def test_less_budget_costs_less(run_folder, tmp_path):
    (tmp_path / "text.txt").write_text("Ada feeds the owl at the mill. " * 40)
    means = []
    for budget in ("0.8", "flops=0.6"):
        options = ("--text", tmp_path / "text.txt", "--tokens", 100, "--output", tmp_path / "page.html")
        highlight(run_folder, "--budget", budget, *options)
        page = page_at(tmp_path / "page.html")
        assert page.cells[:2] == ["all", "100"]
        means.append(float(page.cells[2]))
    assert means[1] < means[0] - 0.05


def test_without_a_text_it_shows_the_validation_documents_of_every_domain(run_folder, tmp_path):
    highlight(run_folder, "--budget", "0.7", "--tokens", 60, "--output", tmp_path / "page.html")
    page = page_at(tmp_path / "page.html")
    assert page.cells[:2] == ["all", "256"]
    assert len(page.stretches) == 2
    assert all(55 < len(stretch.encode()) < 80 for stretch in page.stretches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "0.01"), "0.01"),
        (("--budget", "1.0"), "the full network meets the budget 1.0: every token gets all of it"),
        (("--budget", "quickly"), "cannot read the budget 'quickly'"),
        (("--budget", "0.7", "--text", "nowhere.txt"), "nowhere.txt"),
        (("--budget", "0.7", "--tokens", "513"), "reads 2 to 512 tokens at once, not 513"),
        (("--budget", "0.7", "--tokens", "1"), "reads 2 to 512 tokens at once, not 1"),
        (("--budget", "0.7", "--output", "/dev/null/page.html"), "cannot write /dev/null/page.html"),
    ],
)
def test_a_mistake_is_one_clear_line(run_folder, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        highlight(run_folder, *options)


def test_a_checkpoint_without_a_dynamic_router_says_what_to_train(static):
    printed = fail("highlight", "--checkpoint", static, "--budget", "0.7")
    assert "holds no dynamic router" in printed
    assert "Traceback" not in printed


def test_a_text_without_tokens_is_refused(run_folder, tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text: all 1 files or rows are empty"):
        highlight(run_folder, "--budget", "0.7", "--text", tmp_path / "text.txt")
