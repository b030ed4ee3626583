from statistics import median

import pytest
import torch

from flextron_lit.latency import timing
from flextron_lit.latency.timing import Ratio, interleaved, median_with_spread, seconds
from tests.options import seed


class Machine:
    """Runs that take a set time on a machine that gets slower and slower."""

    def __init__(self, drift=1.0):
        self.speed = 1.0
        self.drift = drift
        self.ran = []

    def run(self, name, time):
        return lambda: self.ran.append((name, time)) or time

    def clock(self, run):
        self.speed *= self.drift
        return run() * self.speed


def test_ratios_do_not_feel_the_machines_drift():
    machine = Machine(drift=1.01)
    runs = {"half": machine.run("half", 0.5), "most": machine.run("most", 0.9)}
    found = interleaved(runs, machine.run("full", 1.0), range(50), machine.clock)
    assert found.ratios["half"].value == pytest.approx(0.5, rel=1e-3)
    assert found.ratios["most"].value == pytest.approx(0.9, rel=1e-3)
    alone = [machine.clock(runs["half"]) for _ in range(50)]
    assert max(alone) / min(alone) > 1.5


def test_an_interruption_now_and_then_spoils_no_ratio():
    machine, taken = Machine(), []

    def clock(run):
        # other programs have their turn: the longer a run, the more often meanwhile
        time = run()
        taken.append(time + 4.0 * (len(taken) * 0.618034 % 1 < 0.5 * time))
        return taken[-1]

    found = interleaved({"half": machine.run("half", 0.5)}, machine.run("full", 1.0), range(400), clock)
    assert found.ratios["half"] == Ratio(0.5, 0.0)
    # the control: against the mean of the two references, which an interruption of either spoils
    rounds = zip(taken[::3], taken[1::3], taken[2::3], strict=True)
    assert median(2 * half / (before + after) for before, half, after in rounds) < 0.4


def test_every_run_stands_between_two_runs_of_the_reference_in_turning_order():
    machine = Machine()
    runs = {name: machine.run(name, 1.0) for name in "abc"}
    found = interleaved(runs, machine.run("full", 2.0), range(3), machine.clock)
    names = "".join(name[0] for name, _ in machine.ran)
    assert names == "fafbfcf" + "fbfcfaf" + "fcfafbf"
    assert found.reference == 2
    assert found.ratios == dict.fromkeys("abc", Ratio(0.5, 0.0))


def test_rounds_end_once_every_ratio_is_sure():
    def rounds(until, unsure=lambda turn: 0.0):
        machine, turns = Machine(), []

        def clock(run):
            name, _ = (run(), machine.ran[-1])[1]
            return 0.5 + unsure(len(turns)) if name == "run" else 1.0

        def counted():
            for turn in range(40):
                turns.append(turn)
                yield turn

        runs = {"run": machine.run("run", 1.0), "other": machine.run("other", 1.0)}
        interleaved(runs, machine.run("full", 1.0), counted(), clock, until)
        return len(turns)

    # an interval takes six
    assert rounds(0.01) == 6
    assert rounds(None) == 40
    assert rounds(0.01, lambda turn: 0.1 * (turn % 2)) == 40
    # noise that ends
    assert 6 < rounds(0.01, lambda turn: 0.1 * (turn < 4)) < 40


def test_the_spread_holds_the_true_median():
    generator = torch.Generator().manual_seed(seed(0))
    held = 0
    for _ in range(600):
        values = torch.empty(31).log_normal_(0.0, 0.5, generator=generator).tolist()
        found = median_with_spread(values)
        ordered = sorted(values)
        low, high = ordered[9], ordered[21]
        assert found.spread == pytest.approx((high - low) / 2)
        held += low <= 1.0 <= high
    # each does with a chance of 0.9706, so 17.6 of 600 do not: all hold, or 46 do not, once in ten million seeds
    assert 554 < held < 600
    assert median_with_spread([3.0]) == Ratio(3.0, 0.0)


def test_seconds_are_those_of_one_run(monkeypatch):
    ran = []
    # a clock that goes by runs: what a real one shows is a matter of what else the machine does
    monkeypatch.setattr(timing, "timer", lambda: 5.0 + 2.5 * len(ran))
    assert seconds(lambda: ran.append(1), torch.device("cpu")) == 2.5
    assert ran == [1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_time_what_the_gpu_does():
    one = torch.randn(4096, 4096, device="cuda")

    def product(times):
        def run():
            for _ in range(times):
                one @ one

        return run

    product(2)()
    short, long = (seconds(product(times), torch.device("cuda")) for times in (4, 16))
    assert 2 < long / short < 8
