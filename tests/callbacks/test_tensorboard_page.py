"""TensorBoard in a browser, on a run that was just trained: its first page draws, and nothing is an error."""

import re
import subprocess
import sys

import pytest

from flextron_lit.callbacks.tensorboard import LAYOUT
from tests.front_door import succeed


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a server shows a short run."""
    folder = tmp_path_factory.mktemp("runs")
    steps = ("--trainer.max_steps", 4, "--trainer.val_check_interval", 2)
    succeed("fit", "-c", "configs/debug.yaml", *steps, "--run_folder", folder / "debug")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0", "--load_fast=false"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        yield next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        server.terminate()


def opened(browser, address, page):
    """A page of it, and what it complained of."""
    tab = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    logged = []
    tab.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: logged.append(error.message))
    tab.goto(f"{address}#{page}")
    return tab, logged


@pytest.mark.slow
def test_the_first_page_answers_whether_it_is_working(address, browser):
    tab, logged = opened(browser, address, "custom_scalars")
    first, charts = next(iter(LAYOUT.items()))
    tab.get_by_text(first, exact=True).first.wait_for(timeout=60_000)
    for chart in charts:
        tab.get_by_text(chart, exact=True).first.wait_for(timeout=10_000)
    tab.wait_for_timeout(2000)
    # points are drawn: losses of two validations, and a number a step
    assert tab.locator("tf-custom-scalar-multi-line-chart-card svg path").count() > 0
    assert logged == []


@pytest.mark.slow
def test_pictures_and_hyper_parameters_are_there(address, browser):
    tab, logged = opened(browser, address, "images")
    tab.get_by_text("val/loss against parameters", exact=False).first.wait_for(timeout=60_000)
    tab.goto(f"{address}#hparams")
    tab.get_by_text("trainer.max_steps", exact=False).first.wait_for(timeout=60_000)
    assert logged == []
