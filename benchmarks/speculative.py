"""What drafting by a sub-network gains over greedy decoding of the full network, and whether the text is the same.

    OMP_NUM_THREADS=1 python benchmarks/speculative.py --checkpoint runs/static_router --lengths 2 4 8 --check

In fp32, batch 1, on prompts from test documents. Times are ratios: each run stands between two of the full network
alone. Every text is compared with the full network's; where it differs first, the full network's two best logits tell
whether rounding decided.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from held_out_text import flextron_folders, prompts_of

from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.costs.counted import parameter_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.selection import Selection
from flextron_lit.generation.speculative import Speculated, speculate
from flextron_lit.latency.device import device_description
from flextron_lit.latency.timing import interleaved, seconds
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.space import SubNetwork
from flextron_lit.terminal.progress import progress

NEAR_TIE = 1e-4
"""Between the two best logits: so little can be rounding."""
Setting = tuple[str, int, float]
"""Name of a draft, its most tokens at once, and its least confidence."""


@dataclass
class Found:
    """What a setting did on the prompts so far."""

    ratios: list[float] = field(default_factory=list)
    made: list[Speculated] = field(default_factory=list)
    new_tokens: int = 0
    same: int = 0
    ties: int = 0
    """Texts that differ behind a near-tie."""
    others: int = 0
    """Texts that differ behind a clear choice."""

    def compare(self, backbone: ElasticBackbone, alone: Tensor, made: Speculated) -> None:
        """Note how a text compares with the full network's."""
        self.made.append(made)
        self.new_tokens += made.accepted + made.passes
        if torch.equal(alone, made.tokens):
            self.same += 1
        elif margin(backbone, alone, made.tokens) < NEAR_TIE:
            self.ties += 1
        else:
            self.others += 1

    def row(self) -> list[str]:
        drafted, accepted, passes = (
            sum(getattr(one, n) for one in self.made) for n in ("drafted", "accepted", "passes")
        )
        return [
            f"{accepted / max(drafted, 1):.0%}",
            f"{self.new_tokens / passes:.2f}",
            f"{1 / median(self.ratios):.3f}",
            f"{1 / max(self.ratios):.3f} to {1 / min(self.ratios):.3f}",
            f"{self.same} of {len(self.made)}",
            str(self.ties),
            str(self.others),
        ]


def margin(backbone: ElasticBackbone, alone: Tensor, made: Tensor) -> float:
    """Between the full network's two best logits where two texts first differ."""
    length = min(alone.shape[1], made.shape[1])
    first = int((alone[0, :length] == made[0, :length]).long().cumprod(0).sum())
    with backbone.use(backbone.space.full()), torch.no_grad():
        best = backbone.model(alone[:, :first], use_cache=False, logits_to_keep=1).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def drafts_of(loaded: Loaded, uniform: Sequence[str], budgets: Sequence[float]) -> dict[str, Selection]:
    """By name: uniform widths, and what the routers of the checkpoint answer."""
    space = loaded.backbone.space
    ratios = {text: [float(part) for part in text.split("/")] for text in uniform}
    found: dict[str, Selection] = {
        f"uniform {text}": space.uniform(mlp=mlp, attention=attention) for text, (mlp, attention) in ratios.items()
    }
    if TrainedRouter.read_all(loaded.folder, space):
        found |= {f"routed {budget:g}": loaded.answer(budget).sub_network for budget in budgets}
    if TrainedDynamicRouter.read_all(loaded.folder, space):
        found |= {f"dynamic {budget:g}": loaded.dynamic_routing.answer(budget, loaded.backbone) for budget in budgets}
    return found


class Runs:
    """Greedy decoding of a prompt, alone or with a draft; the last text of each is kept."""

    def __init__(self, backbone: ElasticBackbone, drafts: Mapping[str, Selection], tokens: int) -> None:
        self.backbone = backbone
        self.drafts = drafts
        # no text ends early: the same work for all
        self.settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        self.alone = torch.empty(0)
        self.made: dict[Setting, Speculated] = {}

    def full(self, prompt: Tensor) -> None:
        with self.backbone.use(self.backbone.space.full()):
            self.alone = self.backbone.model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), **self.settings
            )

    def drafted(self, setting: Setting, prompt: Tensor) -> None:
        draft, length, confidence = setting
        self.made[setting] = speculate(
            self.backbone, prompt, draft=self.drafts[draft], draft_tokens=length, confidence=confidence, **self.settings
        )


def measured(runs: Runs, settings: Sequence[Setting], prompts: Sequence[Tensor]) -> dict[Setting, Found]:
    """Time and compare the settings on some prompts."""
    found = {setting: Found() for setting in settings}
    device = runs.backbone.model.device
    for prompt in progress(prompts, f"{len(settings)} settings on {len(prompts)} prompts"):
        timed = interleaved(
            {setting: partial(runs.drafted, setting, prompt) for setting in settings},
            partial(runs.full, prompt),
            range(1),
            lambda run: seconds(run, device),
        )
        for setting, ratio in timed.ratios.items():
            found[setting].ratios.append(ratio.value)
            found[setting].compare(runs.backbone, runs.alone, runs.made[setting])
    return found


def rows(
    found: Mapping[Setting, Found], backbone: ElasticBackbone, drafts: Mapping[str, Selection]
) -> Iterator[list[str]]:
    parameters = parameter_table(backbone)
    for (name, length, confidence), one in found.items():
        draft = drafts[name]
        size = f"{parameters.ratio(draft):.3f}" if isinstance(draft, SubNetwork) else ""
        yield [name, size, str(length), f"{confidence:g}", *one.row()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--drafts", nargs="*", default=["0.75/0.67", "0.5/0.67", "0.25/0.34"], help="mlp/attention")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.8, 0.6], help="of routed drafts, if any")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8], help="draft tokens")
    parser.add_argument("--confidences", type=float, nargs="+", default=[0, 0.4], help="of a draft to go on")
    parser.add_argument("--prompts", type=int, default=20, help="for the fastest setting")
    parser.add_argument("--table_prompts", type=int, default=4, help="of these, for every setting")
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--check", action="store_true", help="exit 1 if a text differs behind a clear choice")
    options = parser.parse_args()
    (folder,) = flextron_folders([options.checkpoint])
    loaded = load_elastic(str(folder))
    backbone = loaded.backbone
    backbone.model.eval()
    drafts = drafts_of(loaded, options.drafts, options.budgets)
    prompts = prompts_of(loaded, options.prompts, options.prompt_tokens)
    runs = Runs(backbone, drafts, options.tokens)
    runs.full(prompts[0])
    settings = list(product(drafts, options.lengths, options.confidences))
    found = measured(runs, settings, prompts[: options.table_prompts])
    fastest = min(found, key=lambda setting: median(found[setting].ratios))
    shown(found, backbone, drafts, f"{options.table_prompts} prompts")
    checked = measured(runs, [fastest], prompts)
    shown(checked, backbone, drafts, f"the fastest of these on {len(prompts)} prompts")
    device = device_description(torch.device("cpu"))["name"]
    print(f"{torch.get_num_threads()} thread(s), {device}, torch {torch.__version__}")
    others = sum(one.others for one in (*found.values(), *checked.values()))
    if options.check and others:
        sys.exit(f"{others} texts differ from the full network's, behind a choice that is no matter of rounding")


def shown(
    found: Mapping[Setting, Found], backbone: ElasticBackbone, drafts: Mapping[str, Selection], title: str
) -> None:
    table = Table(title=f"greedy decoding with a draft against the full network alone, {title}")
    columns = (
        "draft",
        "parameters",
        "tokens",
        "confidence",
        "accepted",
        "tokens a pass",
        "speed-up",
        "range",
        "same",
        "near-ties",
        "other",
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows(found, backbone, drafts):
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
