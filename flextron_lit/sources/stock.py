"""What transformers makes of a local folder: the only caller of its `Auto` classes. No code of a folder ever runs."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

READ: dict[str, Any] = {"config": AutoConfig, "model": AutoModelForCausalLM, "tokenizer": AutoTokenizer}
CODE = tuple(each.__name__ for each in READ.values())
"""What `auto_map` has Python code for; of other tasks (a reward model, say) it may name as much as it likes."""
OWN = "flextron_"
"""How the `model_type` of our exported classes begins."""


def from_folder(kind: str, folder: Path, **settings: Any) -> Any:
    """Config, model or tokenizer of a folder, by a class of transformers.

    Args:
        kind: a key of `READ`.
        folder: a local one; nothing is fetched.
        settings: for `from_pretrained`.

    Raises:
        ValueError: if the folder asks for code of its own.
        Exception: what transformers raises.
    """
    refuse_code(folder)
    return READ[kind].from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)


def from_config(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A causal LM with random weights, by a class of transformers."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)


def refuse_code(folder: Path) -> None:
    """Refuse what transformers would ask about, and what it would read by a stock class without a word.

    Raises:
        ValueError: naming the file and the code.
    """
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        content = _said(path)
        named = content.get("auto_map")
        code = named if isinstance(named, dict) else {AutoTokenizer.__name__: named}
        found = [reference for name, reference in code.items() if name in CODE and reference]
        if found and str(content.get("model_type", "")).startswith(OWN):
            raise ValueError(f"{folder} is an exported sub-network; name the Flextron checkpoint that it was cut from")
        if found:
            raise ValueError(
                f"{path} asks for Python code of its own ({json.dumps(found[0])}), which is never run here; if a stock "
                "class of transformers reads this folder as well, take auto_map out of that file"
            )


def refuse_quantised(folder: Path) -> None:
    """Refuse weights that are packed, in stages that leave them as they are too.

    Raises:
        ValueError: naming what packed them.
    """
    packed = _said(folder / "config.json").get("quantization_config")
    if packed:
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise ValueError(
            f"{folder} holds weights that are quantised ({method or 'quantization_config'} in its config.json): they "
            "are packed in blocks, of which narrower widths are no prefix, also where the network is frozen; start "
            "from the weights as they were before, and quantise after export"
        )


def _said(path: Path) -> dict[str, Any]:
    """A config; nothing of one that is missing or damaged, which is told by whoever reads it."""
    content: Any = {}
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
