"""Time of a training step, and of a token, with projections of their own for narrower widths and without, interleaved.

    python benchmarks/compensation_speed.py --check

Random weights in the shape of SmolLM2-135M. A step is what elastic training does: the full network and one sampled
sub-network forward and backward, and an update by AdamW. Only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from shapes import SMOLLM2_135M
from speed import Variant, interleaved

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.reconstruction import prepare
from flextron_lit.latency.device import device_description

LIMIT = 1.02


class Training:
    """Steps of one network; the same sub-networks for every network."""

    def __init__(self, form: str, ids: torch.Tensor) -> None:
        torch.manual_seed(0)
        self.backbone = ElasticBackbone(LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).train())
        prepare(self.backbone, form)
        self.ids = ids
        self.optimizer = torch.optim.AdamW(self.backbone.model.parameters(), lr=1e-5)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """One update."""
        space = self.backbone.space
        for sub_network in (space.random(self.generator), space.full()):
            with self.backbone.use(sub_network):
                self.backbone.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gigabytes(self) -> float:
        """Of weights, gradients and AdamW's two moments."""
        return sum(parameter.nbytes for parameter in self.backbone.model.parameters()) * 4 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help=f"exit 1 if a ratio is above {LIMIT}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (1, options.tokens))
    training = {form: Training(form, ids) for form in ("none", "own")}
    steps = interleaved({form: each.step for form, each in training.items()}, options.rounds)
    half = training["own"].backbone.space.uniform(mlp=0.5, attention=0.67)
    variants = {
        form: Variant(each.backbone.model.eval(), lambda each=each: each.backbone.use(half), ids)
        for form, each in training.items()
    }
    tokens = interleaved({form: each.token for form, each in variants.items()}, 6 * options.rounds)
    ratios = {"a training step": steps["own"] / steps["none"], "one token": tokens["own"] / tokens["none"]}
    for name, ratio in ratios.items():
        print(f"{name}, with / without: {ratio:.3f}")
    memory = {form: each.gigabytes() for form, each in training.items()}
    print(f"weights, gradients and AdamW's state: {memory['own']:.2f} GB, without {memory['none']:.2f} GB")
    machine = device_description(torch.device("cpu"))["name"]
    print(f"{options.tokens} tokens, fp32, {options.threads} thread(s), medians of {options.rounds}; {machine}")
    if options.check and max(ratios.values()) > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
