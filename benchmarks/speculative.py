"""What drafting by a sub-network gains over greedy decoding of the full network, and whether the text is the same.

    OMP_NUM_THREADS=1 python benchmarks/speculative.py --checkpoint runs/static_router --lengths 2 4 8 --check

In fp32, batch 1, on prompts from test documents. Beside sub-networks as drafts stand those that transformers makes by
itself (`stock_drafts.py`): prompt lookup and early exit. Times are ratios: each run stands between two of the full
network alone. Every text is compared with the full network's; where it differs first, the full network's two best
logits tell whether rounding decided. A prompt whose settings `--results` has is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
import first_look
from held_out_text import flextron_folders, prompts_of
from kept_results import Kept
from results_dynamic import draft_cells
from stock_drafts import StockDraft, stock_drafts

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
RESULTS = Path("benchmarks/results/speculative.json")
QUICK = {
    "drafts": ["0.5/0.67"],
    "budgets": [0.8],
    "exits": [26],
    "lengths": [4],
    "confidences": [0.4],
    "prompts": 1,
    "table_prompts": 1,
    "tokens": 16,
    "results": Path("build/quick/speculative.json"),
}
"""Settings of a first look."""
Setting = tuple[str, int, float]
"""Name of a draft, its most tokens at once, and its least confidence."""
Draft = Selection | StockDraft


@dataclass(frozen=True)
class Text:
    """What a setting did on one prompt."""

    ratio: float
    """Of its time to that of the full network alone."""
    drafted: int
    accepted: int
    passes: int
    verdict: str
    """How the text compares with the full network's: `same`, or what it differs behind, a `tie` or a clear choice."""


Found = dict[Setting, list[Text]]
"""Of every prompt."""


def compared(backbone: ElasticBackbone, alone: Tensor, made: Tensor) -> str:
    """Of two texts."""
    if torch.equal(alone, made):
        return "same"
    return "tie" if margin(backbone, alone, made) < NEAR_TIE else "other"


def summary(texts: Sequence[Text]) -> dict[str, Any]:
    """What a setting did on all of them."""
    drafted, accepted, passes = (sum(getattr(one, n) for one in texts) for n in ("drafted", "accepted", "passes"))
    ratios = [one.ratio for one in texts]
    return {
        "accepted": accepted / max(drafted, 1),
        "tokens_a_pass": (accepted + passes) / passes,
        "speed_up": 1 / median(ratios),
        "range": [1 / max(ratios), 1 / min(ratios)],
        "texts": len(texts),
        **{verdict: sum(one.verdict == verdict for one in texts) for verdict in ("same", "tie", "other")},
    }


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

    def __init__(self, backbone: ElasticBackbone, drafts: Mapping[str, Draft], tokens: int) -> None:
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
        name, length, confidence = setting
        draft = self.drafts[name]
        if isinstance(draft, StockDraft):
            with self.backbone.use(self.backbone.space.full()):
                self.made[setting] = draft(self.backbone.model, prompt, length, confidence, **self.settings)
        else:
            self.made[setting] = speculate(
                self.backbone, prompt, draft=draft, draft_tokens=length, confidence=confidence, **self.settings
            )


def measured(kept: Kept, kind: str, runs: Runs, settings: Sequence[Setting], prompts: Sequence[Tensor]) -> Found:
    """Time and compare the settings on some prompts, but for what is known of them."""
    found: Found = {setting: [] for setting in settings}
    for number, prompt in enumerate(progress(prompts, f"{len(settings)} settings on {len(prompts)} prompts")):
        known = kept.kept.get(kind, {}).get(str(number), {})
        missing = [setting for setting in settings if key(setting) not in known]
        if missing:
            known = known | of_prompt(runs, missing, prompt)
            kept.write(kind, str(number), known)
        for setting in settings:
            found[setting].append(Text(**known[key(setting)]))
    return found


def of_prompt(runs: Runs, settings: Sequence[Setting], prompt: Tensor) -> dict[str, Any]:
    """By the key of the setting, what it did."""
    device = runs.backbone.model.device
    timed = interleaved(
        {setting: partial(runs.drafted, setting, prompt) for setting in settings},
        partial(runs.full, prompt),
        range(1),
        lambda run: seconds(run, device),
    )
    found = {}
    for setting, ratio in timed.ratios.items():
        made = runs.made[setting]
        verdict = compared(runs.backbone, runs.alone, made.tokens)
        found[key(setting)] = asdict(Text(ratio.value, made.drafted, made.accepted, made.passes, verdict))
    return found


def key(setting: Setting) -> str:
    name, length, confidence = setting
    return f"{name}, {length}, {confidence:g}"


def settings_of(drafts: Mapping[str, Draft], lengths: Sequence[int], confidences: Sequence[float]) -> list[Setting]:
    """All that there is to choose; a lookup has no confidence."""
    lookups = {name for name, draft in drafts.items() if isinstance(draft, StockDraft) and draft.exit_layer is None}
    sure = [(name, length, 0.0) for name, length in product(lookups, lengths)]
    return [*product([name for name in drafts if name not in lookups], lengths, confidences), *sure]


def rows(found: Found, backbone: ElasticBackbone, drafts: Mapping[str, Draft]) -> dict[str, Any]:
    """What is written down, by the key of the setting."""
    parameters = parameter_table(backbone)
    made = {}
    for setting, texts in found.items():
        (name, length, confidence), draft = setting, drafts[setting[0]]
        size = parameters.ratio(draft) if isinstance(draft, SubNetwork) else None
        about = {"draft": name, "parameters": size, "tokens": length, "confidence": confidence}
        made[key(setting)] = {**about, **summary(texts)}
    return made


def main() -> None:
    options = parsed()
    (folder,) = flextron_folders([options.checkpoint])
    loaded = load_elastic(str(folder))
    backbone = loaded.backbone
    backbone.model.eval()
    drafts: dict[str, Draft] = {**drafts_of(loaded, options.drafts, options.budgets), **stock_drafts(options.exits)}
    prompts = prompts_of(loaded, options.prompts, options.prompt_tokens)
    runs, kept = Runs(backbone, drafts, options.tokens), Kept(options.results)
    runs.full(prompts[0])
    settings = settings_of(drafts, options.lengths, options.confidences)
    found = measured(kept, "prompts", runs, settings, prompts[: options.table_prompts])
    kept.write("rows", "all", rows(found, backbone, drafts))
    shown(kept.kept["rows"]["all"], f"{options.table_prompts} prompts")
    fastest = min(found, key=lambda setting: median(one.ratio for one in found[setting]))
    checked = measured(kept, "prompts, the fastest", runs, [fastest], prompts)
    kept.write("rows", "fastest", rows(checked, backbone, drafts))
    shown(kept.kept["rows"]["fastest"], f"the fastest of these on {len(prompts)} prompts")
    device = device_description(torch.device("cpu"))["name"]
    print(f"{torch.get_num_threads()} thread(s), {device}, torch {torch.__version__}")
    others = sum(row["other"] for part in kept.kept["rows"].values() for row in part.values())
    if options.check and others:
        sys.exit(f"{others} texts differ from the full network's, behind a choice that is no matter of rounding")


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", type=Path, required=True)
    made.add_argument("--drafts", nargs="*", default=["0.75/0.67", "0.5/0.67", "0.25/0.34"], help="mlp/attention")
    made.add_argument("--budgets", type=float, nargs="*", default=[0.8, 0.6], help="of routed drafts, if any")
    made.add_argument("--exits", type=int, nargs="*", default=[20, 26], help="layers after which transformers drafts")
    made.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8], help="draft tokens")
    made.add_argument("--confidences", type=float, nargs="+", default=[0, 0.4], help="of a draft to go on")
    made.add_argument("--prompts", type=int, default=20, help="for the fastest setting")
    made.add_argument("--table_prompts", type=int, default=4, help="of these, for every setting")
    made.add_argument("--prompt_tokens", type=int, default=32)
    made.add_argument("--tokens", type=int, default=64, help="to generate")
    made.add_argument("--check", action="store_true", help="exit 1 if a text differs behind a clear choice")
    made.add_argument("--results", type=Path, default=RESULTS)
    return first_look.parsed(made, QUICK, "one prompt, elsewhere")


def shown(found: Mapping[str, Mapping[str, Any]], title: str) -> None:
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
    for row in found.values():
        table.add_row(*draft_cells(row), str(row["tie"]), str(row["other"]))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
