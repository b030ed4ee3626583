"""What conversion of a large model takes: one decoder layer of its shape run here, and the whole worked out from it.

    python benchmarks/reconstruction_cost.py

The layer has random weights and a vocabulary of 1,000, and runs in float32. Measured apart: the pass over calibration
text with nothing solved (it grows with the tokens), the solving (it does not), and the gradients for the excess losses.
The whole is `layers` times that; embeddings, the output layer and loading the weights come on top.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent.parent)]
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.fisher import output_gradients
from flextron_lit.elastic.reconstruction import reconstruct
from flextron_lit.latency.device import device_description
from flextron_lit.space import SpaceConfig
from flextron_lit.terminal.console import duration

BLOCK = 512


def seconds(run: Callable[[], object]) -> float:
    """Of one call; on a GPU until it is done."""
    begun = time.monotonic()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - begun


def gigabytes() -> float:
    """Largest memory of this process so far, on the device if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_groups", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="that run here")
    parser.add_argument("--calibration_tokens", type=int, default=16384, help="of the whole, worked out")
    parser.add_argument("--excess_tokens", type=int, default=8192, help="of the whole, worked out")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.neurons,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_groups,
        num_hidden_layers=1,
        vocab_size=1000,
    )
    model = LlamaForCausalLM(config).to(device).requires_grad_(False)
    groups = options.kv_groups
    quarters = sorted({max(1, groups * part // 4) for part in (1, 2, 3, 4)})
    backbone = ElasticBackbone(model, SpaceConfig(attention=quarters))
    ids = torch.randint(1000, (options.tokens // BLOCK, BLOCK), device=device)
    loaded = gigabytes()
    with torch.no_grad():
        forward = seconds(lambda: model(ids, use_cache=False, logits_to_keep=1))
    batches = [{"input_ids": row[None]} for row in ids]
    gradients: list[list[torch.Tensor]] = []
    backward = seconds(lambda: gradients.append(output_gradients(backbone, batches, torch.Generator().manual_seed(0))))
    solved = seconds(lambda: reconstruct(backbone, {"input_ids": ids}, None, "own", gradients[0])) - forward
    peak = gigabytes()
    passes = forward / options.tokens * options.calibration_tokens
    fisher = backward / options.tokens * options.excess_tokens
    print(f"one layer, {options.tokens} tokens, {device_description(device)['name']}, torch {torch.__version__}")
    print(f"forward {forward:.1f} s, gradients {backward:.1f} s, order and projections {solved:.1f} s")
    print(f"memory {loaded:.1f} GB with the layer loaded, at most {peak:.1f} GB")
    whole = options.layers * (passes + fisher + solved)
    print(
        f"worked out for {options.layers} layers, {options.calibration_tokens} + {options.excess_tokens} tokens: "
        f"{duration(whole)}, of it passes {options.layers * passes:.0f} s, gradients {options.layers * fisher:.0f} s, "
        f"solving {options.layers * solved:.0f} s"
    )
    held = 2 * options.layers * options.hidden_size**2 * 4 / 1e9
    more = options.calibration_tokens / options.tokens - 1
    activations = options.tokens * (3 * options.neurons + 8 * options.hidden_size) * 4 / 1e9 * more
    print(
        f"memory beside the weights: at most {peak - loaded + activations:.1f} GB for a layer, and {held:.1f} GB of "
        "gradient covariances on the processor"
    )


if __name__ == "__main__":
    main()
