"""Whether a dynamic router generates the same with a KV cache and without one, in fp32, on prompts from test documents.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_generation.py --checkpoint runs/dynamic_router --budget 0.7 --check

Greedy. The widths of a prompt's tokens do not depend on how the past was computed, so the tokens must be the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from held_out_text import flextron_folders, prompts_of

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.routers.trained import TrainedDynamicRouter
from flextron_lit.terminal.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the dynamic router stage")
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--check", action="store_true", help="exit 1 if a prompt's tokens differ")
    options = parser.parse_args()
    (folder,) = flextron_folders([options.checkpoint])
    loaded = load_elastic(str(folder))
    model = loaded.backbone.model.eval()
    (router, *_) = TrainedDynamicRouter.read_all(folder, loaded.backbone.space)
    policy = router.policy([options.budget])
    prompts = prompts_of(loaded, options.prompts, options.prompt_tokens)
    same, least = 0, float("inf")
    for prompt in progress(prompts, "prompts"):
        with loaded.backbone.use(policy), torch.no_grad():
            shape = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
            cached = model.generate(prompt, **shape, use_cache=True, output_scores=True, return_dict_in_generate=True)
            uncached = model.generate(prompt, **shape, use_cache=False)
        best = torch.stack(cached.scores).topk(2).values
        least = min(least, float((best[..., 0] - best[..., 1]).min()))
        same += torch.equal(cached.sequences, uncached)
    shares = policy.take()
    spread = float((shares / shares.sum(-1, keepdim=True)).max(-1).values.mean())
    print(
        f"{same} of {options.prompts} prompts: {options.tokens} tokens are the same with a cache and without; closest "
        f"call of the arg-max {least:.1e}; on average {spread:.0%} of a block's tokens make its most frequent choice"
    )
    if options.check and same < options.prompts:
        sys.exit("the tokens differ")


if __name__ == "__main__":
    main()
