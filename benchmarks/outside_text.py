"""What training cost the full network on text that nobody trained on: dense source against Flextron checkpoint.

python benchmarks/outside_text.py --checkpoint runs/quickstart/elastic/flextron --text wikitext2_raw_test.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from text_loss import blocks_of, loss_on

from flextron_lit import checkpoint
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.sources import load_dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="Flextron checkpoints of one source")
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure on")
    parser.add_argument("--tokens", type=int, default=32768, help="first tokens of it")
    parser.add_argument("--block_size", type=int, default=512)
    options = parser.parse_args()
    source = checkpoint.read(options.checkpoint[0]).history[0]["source"]
    blocks = blocks_of(options.text, source, tokens=options.tokens, block_size=options.block_size)
    print(f"nats per token on {blocks.numel()} tokens of {options.text.name}")
    dense = None
    for name in (source, *map(str, options.checkpoint)):
        backbone = ElasticBackbone(load_dense(name))
        loss = loss_on(backbone, backbone.space.full(), blocks, name)
        dense = loss if dense is None else dense
        print(f"{loss:.4f} ({loss - dense:+.4f} to the dense model): {name}", flush=True)


if __name__ == "__main__":
    main()
