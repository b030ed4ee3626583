"""Reads folders with another release of transformers: python -I older.py ROOT; writes ROOT/results/."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__


def examine(folder, ids, texts):
    """Logits and greedy tokens, and what the tokenizer makes of texts and of a conversation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tensors = {"logits": model(ids, use_cache=False).logits}
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # as a model's card does it: all that the tokenizer makes goes in
    inputs = tokenizer(texts[0], return_tensors="pt")
    tensors["said"] = model.generate(**inputs, **settings)
    chat = [{"role": "user", "content": texts[0]}]
    note = {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
        "special": sorted(tokenizer.all_special_tokens),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else None,
        "length": tokenizer.model_max_length,
    }
    return tensors, note


def main(root):
    os.chdir(root)
    ids, texts = load_file("ids.safetensors")["ids"], json.loads(Path("texts.json").read_text())
    results = Path("results")
    results.mkdir()
    (results / "version.txt").write_text(__version__)
    for folder in sorted(path.parent for path in Path().glob("*/config.json")):
        tensors, note = {}, {}
        try:
            if "auto_map" in json.loads((folder / "config.json").read_text()):
                AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            else:
                tensors, note = examine(folder, ids, texts)
        except Exception as error:
            note = {"error": f"{type(error).__name__}: {error}"}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, results / f"{folder.name}.safetensors"
        )
        (results / f"{folder.name}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
