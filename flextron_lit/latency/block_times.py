"""Measures the latencies of a device: every kind of block at every width, inside the real forward pass.

The full network is measured all along and everything else as a ratio to it, so that a machine whose speed drifts still
gives true ratios (ours). A width's cost follows from the network in which all blocks of a kind have that width: what it
saves against the full one, divided by their number. So equal blocks are measured once, all of them together.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from math import ceil
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads
from torch.utils.benchmark.utils.timer import timer
from transformers import Cache, DynamicCache, StaticCache

from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.costs.table import CostTable
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.elastic.kv_cache import fill, retract, retractable
from flextron_lit.elastic.positions import demand_positions
from flextron_lit.elastic.selection import Selection
from flextron_lit.latency.correction import corrected
from flextron_lit.latency.latency_table import HeldOut, LatencyTable, PhaseLatency, conditions
from flextron_lit.latency.timing import Interleaved, Run, interleaved, seconds
from flextron_lit.space import KINDS, Block, BlockKind, ElasticSpace, SubNetwork
from flextron_lit.terminal.progress import progress

Probe = tuple[BlockKind, int]
"""A kind of block and a width that is not its full one."""
Name = TypeVar("Name")
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
SAMPLE_SECONDS, KEPT_ROUNDS = 0.05, 20
"""A sample that is timed is to be much longer than the turns of other programs, of a few milliseconds: they then take
the same share of all. As long as so many rounds are left."""
DECODE_SHARE = 0.3
"""Of the time for a profile; a decode step is short, so many fit."""
SHARE_RUNS = 3


class Passes:
    """The passes of a workload with one selection, as generation runs them.

    Args:
        backbone: the elastic network, on the device to measure.
        selection: what to run: a sub-network, or a policy.
        workload: shapes of the prompt and of the generation.
        text: token ids [B, T], T at least the workload's total: what a trained router chooses depends on them. None
            for a sub-network, or a policy that does not look at them.
    """

    def __init__(
        self, backbone: ElasticBackbone, selection: Selection, workload: Workload, text: Tensor | None = None
    ) -> None:
        self.backbone = backbone
        self.selection = selection
        self.workload = workload
        shape = workload.batch_size, workload.total_tokens
        self.text = (torch.ones(shape, dtype=torch.long) if text is None else text).to(backbone.model.device)
        assert self.text.shape[0] == shape[0]
        assert self.text.shape[1] >= shape[1]
        self._behind = round(workload.decode_context) - 1
        self._steps = 0

    def prefill(self) -> None:
        """All tokens of the prompt at once, into an empty cache."""
        self._run(self.text[:, : self.workload.prompt_tokens], self._empty())

    def decode(self) -> None:
        """One token, behind as many as there are half-way through the generation; each time the next of the text."""
        place = self._behind + self._steps % (self.workload.total_tokens - self._behind)
        self._steps += 1
        self._run(self.text[:, place : place + 1], self._half_way)
        retract(self._half_way, 1)

    @cached_property
    def _half_way(self) -> Cache:
        cache = self._empty()
        if isinstance(cache, DynamicCache):
            retractable(cache)
        # a policy finds the keys and values of all groups, whoever computed them
        static = self.selection if isinstance(self.selection, SubNetwork) else self.backbone.space.full()
        Passes(self.backbone, static, self.workload, self.text)._run(self.text[:, : self._behind], cache)
        # as if its own, of which only the time counts
        fill(cache, self.selection)
        return cache

    def _empty(self) -> Cache:
        config = self.backbone.model.config
        if self.backbone.compiled is None:
            return DynamicCache(config=config)
        # as `generate` takes it, with room for the last token
        return StaticCache(config=config, max_cache_len=self.workload.total_tokens + 1)

    def _run(self, ids: Tensor, cache: Cache) -> None:
        with self.backbone.use(self.selection), torch.no_grad():
            self.backbone.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def profile(
    backbone: ElasticBackbone, workload: Workload, *, budget_seconds: float = 60.0, held_out: int = 20, seed: int = 0
) -> LatencyTable:
    """Measure a latency table, and its error on sub-networks that it was not made from.

    Args:
        backbone: the elastic network, on the device to measure and in the workload's dtype; values do not matter.
        workload: the request to measure.
        budget_seconds: time for the table; the check on held-out sub-networks takes about as much again.
        held_out: number of those sub-networks, heterogeneous and spread evenly over cost; 0 leaves the check out.
        seed: of their draw.

    Raises:
        ValueError: if the workload does not fit in memory, or takes more positions than the model has.
    """
    space, phases = backbone.space, {}
    counts = probe_counts(space)
    for phase in workload.phases:
        time = phase_seconds(phase, budget_seconds)
        found = measure(backbone, workload, phase, probes(space), time)
        saved = {probe: (1 - ratio.value) / counts[probe] for probe, ratio in found.ratios.items()}
        parts = space, phase, 1e3 * found.reference, saved, time_shares(backbone, workload, phase)
        table = table_of(*parts)
        spread = max((ratio.spread for ratio in found.ratios.values()), default=0.0)
        chosen = dict(enumerate(spread_over_cost(space, table, held_out, seed)))
        ratios = measure(backbone, workload, phase, chosen, time, title="checking").ratios if chosen else {}
        factor, predicted = corrected([(table.ratio(each), ratios[i].value) for i, each in chosen.items()])
        rows = (HeldOut(each.choices, predicted[i], ratios[i].value) for i, each in chosen.items())
        phases[phase] = PhaseLatency(table_of(*parts, factor=factor), spread, tuple(rows), factor)
    return LatencyTable(conditions(backbone, workload), phases)


def measure(
    backbone: ElasticBackbone,
    workload: Workload,
    phase: Phase,
    chosen: Mapping[Name, Selection],
    budget_seconds: float,
    text: Tensor | None = None,
    title: str = "measuring",
    until: float | None = None,
) -> Interleaved[Name]:
    """Times of sub-networks or policies relative to the full network's, in one phase of a workload.

    Args:
        backbone: the elastic network, on the device to measure.
        workload: the request to measure.
        phase: of the request.
        chosen: what to time, by name.
        budget_seconds: time for it: as many rounds as fit.
        text: as in `Passes`.
        title: what is being done, for the progress.
        until: the spread of a ratio that is small enough: with it for all, no more rounds are run; None uses the time.

    Raises:
        ValueError: if the workload does not fit in memory, or takes more positions than the model has.
    """

    def passes(selection: Selection) -> Run:
        return getattr(Passes(backbone, selection, workload, text), phase)

    runs = {name: passes(each) for name, each in chosen.items()}
    reference = passes(backbone.space.full())
    repeats = 1

    def clock(run: Run) -> float:
        return fmean(seconds(run, device=backbone.model.device) for _ in range(repeats))

    with measuring(backbone, workload):
        # one round ahead: threads, caches and clocks of the processor settle; the next one tells how many fit
        for run in (reference, *runs.values()):
            run()
        begun = timer()
        first = interleaved(runs, reference, range(1), clock)
        possible = budget_seconds / max(timer() - begun, 1e-9)
        repeats = max(1, min(ceil(SAMPLE_SECONDS / max(first.reference, 1e-9)), int(possible / KEPT_ROUNDS)))
        rounds = min(max(int(possible / repeats), LEAST_ROUNDS), MOST_ROUNDS)
        description = f"{title} {phase}: {rounds} rounds of {len(runs)} networks against the full one"
        return interleaved(runs, reference, progress(range(rounds), description), clock, until)


def probes(space: ElasticSpace) -> dict[Probe, SubNetwork]:
    """For every kind and width below the full one: the network in which all blocks that can have that width do."""
    found: dict[Probe, SubNetwork] = {}
    for index, block in enumerate(space.blocks):
        for choice, width in enumerate(block.widths[:-1]):
            probe = (block.kind, width)
            found[probe] = found.get(probe, space.full()).replace(index, choice)
    return found


def phase_seconds(phase: Phase, budget_seconds: float) -> float:
    """Time for one phase."""
    return budget_seconds * (DECODE_SHARE if phase == "decode" else 1 - DECODE_SHARE)


def time_shares(backbone: ElasticBackbone, workload: Workload, phase: Phase) -> dict[BlockKind, float]:
    """Share of the full network's time that is spent in one block of each kind.

    It splits the time of the full network between blocks and the rest; sums over a whole network do not depend on it.
    """
    run: Run = getattr(Passes(backbone, backbone.space.full(), workload), phase)
    inside = dict.fromkeys(KINDS, 0.0)
    begun = 0.0

    def enter(*_: Any) -> None:
        nonlocal begun
        begun = timer()

    def leave(kind: BlockKind, *_: Any) -> None:
        inside[kind] += timer() - begun

    with measuring(backbone, workload), ExitStack() as hooks:
        if backbone.compiled is not None:
            # the split is that of the network as it is: compiled code has no hooks
            hooks.enter_context(backbone.compiled.paused())
        for elastic in backbone.blocks:
            hooks.enter_context(elastic.module.register_forward_pre_hook(enter))
            hooks.enter_context(elastic.module.register_forward_hook(partial(leave, elastic.block.kind)))
        start = timer()
        for _ in range(SHARE_RUNS):
            run()
        total = timer() - start
    counts = Counter(block.kind for block in backbone.space.blocks)
    return {kind: inside[kind] / total / counts[kind] for kind in KINDS}


def probe_counts(space: ElasticSpace) -> Counter[Probe]:
    """Blocks that have a width below the full one, by kind and width."""
    return Counter((block.kind, width) for block in space.blocks for width in block.widths[:-1])


def table_of(
    space: ElasticSpace,
    phase: Phase,
    full_time: float,
    saved: Mapping[Probe, float],
    shares: Mapping[BlockKind, float],
    largest: float | None = None,
    factor: float = 1.0,
) -> CostTable:
    """The table that gives the times of a phase.

    Args:
        space: the choices.
        phase: names the table.
        full_time: of the full network, in milliseconds.
        saved: what one block saves against its full width, as a share of `full_time`.
        shares: what one block of the full network takes, likewise (`time_shares`).
        largest: what the table has for all blocks at full width, likewise, if not 1; `full_time` is then its reference.
        factor: on what is saved (`correction.corrected`).
    """
    saved = {probe: factor * each for probe, each in saved.items()}
    total = 1.0 if largest is None else largest
    blocks = Counter(block.kind for block in space.blocks)
    least = {kind: max([s for (k, _), s in saved.items() if k == kind] + [0.0]) for kind in KINDS}
    room = total - sum(blocks[kind] * least[kind] for kind in KINDS)
    if room < 0:
        # blocks together save more than all takes: noise, and no table has a cost below 0
        scale = total / (total - room)
        least, saved = {k: scale * s for k, s in least.items()}, {p: scale * s for p, s in saved.items()}
    # a block cannot save more than it costs, nor all of them cost more than the whole: it is the split that errs
    more = {kind: max(shares[kind] - least[kind], 0.0) for kind in KINDS}
    wanted = sum(blocks[kind] * more[kind] for kind in KINDS)
    part = min(1.0, max(room, 0.0) / wanted) if wanted else 0.0
    full = {kind: least[kind] + part * more[kind] for kind in KINDS}

    def costs(block: Block) -> tuple[float, ...]:
        shares_of = (full[block.kind] - saved.get((block.kind, width), 0.0) for width in block.widths)
        return tuple(full_time * share for share in shares_of)

    rows = tuple(costs(block) for block in space.blocks)
    fixed = full_time * total - sum(row[-1] for row in rows)
    return CostTable(phase, "ms", fixed, rows, None if largest is None else full_time)


def spread_over_cost(space: ElasticSpace, table: CostTable, count: int, seed: int) -> list[SubNetwork]:
    """Heterogeneous sub-networks spread evenly over the costs that the table says they have.

    Args:
        space: the choices.
        table: their costs.
        count: of sub-networks.
        seed: of their draw.
    """
    generator = torch.Generator().manual_seed(seed)
    low = table.ratio(space.smallest())
    ratios = [low + (1 - low) * (index + 0.5) / count for index in range(count)]
    return [sampling.nearest_to_cost(space, table, ratio, generator) for ratio in ratios]


@contextmanager
def measuring(backbone: ElasticBackbone, workload: Workload) -> Iterator[None]:
    """Set a model up for a workload's passes, and put it back.

    Raises:
        ValueError: if the workload does not fit in memory, or takes more positions than the model has.
    """
    remedy = "lower prompt_tokens or generated_tokens"
    demand_positions(backbone.model.config, workload.total_tokens, "the workload", remedy)
    try:
        with backbone.evaluating(), set_torch_threads(workload.threads or torch.get_num_threads()):
            yield
    except (RuntimeError, MemoryError) as error:
        # torch has an exception of its own for accelerators alone
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"the workload does not fit in memory ({workload.batch_size} x {workload.prompt_tokens} tokens: {error}); "
            "lower batch_size or prompt_tokens"
        ) from error
