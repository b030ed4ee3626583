"""Loads exported folders where flextron_lit cannot be imported: python -I elsewhere.py ROOT; writes ROOT/results/."""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
WAYS = {
    "cached": {"use_cache": True},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


def examine(folder, ids):
    """Logits and greedy continuations of one folder."""
    own = "auto_map" in json.loads((folder / "config.json").read_text())
    trust = {"trust_remote_code": True} if own else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        tensors = {"logits": model(ids, use_cache=False).logits}
        for name, how in WAYS.items():
            tensors[name] = model.generate(ids, attention_mask=mask, **GREEDY, **how)
        model.set_attn_implementation("eager")
        eager = model(ids, use_cache=False, output_attentions=True)
        tensors["eager"] = eager.logits
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    note = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "tokens": tokenizer("The owl.")["input_ids"],
        "heads": [weights.shape[1] for weights in eager.attentions],
    }
    return tensors, note


def run_card(folder):
    """What the code of the model card prints."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    if code is None:
        return None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code[1], {})
    return printed.getvalue()


def refusal(folder):
    """What loading without trust says."""
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return None


def main(root):
    assert importlib.util.find_spec("flextron_lit") is None
    os.chdir(root)
    ids = load_file("ids.safetensors")["ids"]
    Path("results").mkdir()
    for folder in sorted(path for path in Path().iterdir() if (path / "config.json").is_file()):
        tensors, note = examine(folder, ids)
        note["untrusted"] = refusal(folder)
        note["card"] = run_card(folder)
        save_file(tensors, f"results/{folder.name}.safetensors")
        Path(f"results/{folder.name}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
