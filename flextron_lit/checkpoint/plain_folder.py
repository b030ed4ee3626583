"""Network and tokenizer as a plain Hugging Face folder, which transformers 4.57 reads as 5 does."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron_lit.checkpoint.folder import MAX_SHARD_SIZE
from flextron_lit.files.damage import read_json
from flextron_lit.files.whole_file import write_text
from flextron_lit.sources.model_files import BESIDE_TOKENIZER, TERMS, pass_on
from flextron_lit.terminal.progress import quiet_transformers

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
ROTARY = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""What 4.57 calls rotary settings, by `model_type`; in other families it has `rope_theta` alone."""
OF_OUR_CALL = ("local_files_only", "is_local", "backend")
"""What a tokenizer notes of how it was loaded, and 4.57 takes for settings."""
OF_ITS_CLASS = ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
"""What a tokenizer may have from its class alone, and loses with it."""
Settings = dict[str, Any]


def save_model(
    folder: Path,
    model: PreTrainedModel,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Weights and config, and on what terms they may be used.

    Args:
        folder: target.
        model: of a stock class, or of one of ours, which 4.57 cannot run.
        state_dict: full weights, where the live parameters are sharded.
        max_shard_size: of a weight file; larger networks are written in several.
    """
    # a copy: the library takes out what it does not write
    given = dict(state_dict) if state_dict else None
    with quiet_transformers():
        # not the model's own, which may write a Flextron checkpoint
        PreTrainedModel.save_pretrained(model, folder, state_dict=given, max_shard_size=max_shard_size)
    _rewrite(folder / CONFIG, lambda config: config | dict(_older(config)))
    pass_on(model.name_or_path, folder, TERMS)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that gives the same token ids in both, with what other programs read of it."""
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        whole = {name: getattr(tokenizer, name) for name in OF_ITS_CLASS} if (folder / TOKENIZER).is_file() else None
        _rewrite(path, lambda settings: _for_both(settings, whole))
    pass_on(getattr(tokenizer, "name_or_path", None), folder, BESIDE_TOKENIZER)


def bring_up(folder: Path) -> set[str]:
    """Config and tokenizer of a folder of format 1 as they are written today; returns what was rewritten."""
    changes: dict[str, Callable[[Settings], Settings]] = {CONFIG: lambda config: config | dict(_older(config))}
    path = folder / TOKENIZER_CONFIG
    # of its class it has nothing; what others have cannot be told from the file
    if path.is_file() and read_json(path).get("tokenizer_class") == "TokenizersBackend":
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        changes[TOKENIZER_CONFIG] = lambda settings: _for_both(inputs | settings, {})
    for name, change in changes.items():
        _rewrite(folder / name, change)
    return set(changes)


def _older(config: Settings) -> Iterator[tuple[str, Any]]:
    """Rotary settings by their older names: 4.57 ignores `rope_parameters` without a word."""
    rope = dict(config.get("rope_parameters") or {})
    if not rope or "auto_map" in config:
        return
    for name, older in ROTARY.get(config["model_type"], {"rope_theta": "rope_theta"}).items():
        yield older, rope.pop(name)
    if rope["rope_type"] == "longrope":
        # which 4.57 works out of other numbers
        early = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config["max_position_embeddings"] / early
        by_factor = math.sqrt(1 + math.log(factor) / math.log(early)) if factor > 1 else 1.0
        rope["attention_factor"] = by_factor if rope.get("attention_factor") is None else rope["attention_factor"]
        yield "original_max_position_embeddings", early
    if rope["rope_type"] != "default":
        yield "rope_scaling", rope


def _for_both(settings: Settings, of_its_class: Settings | None) -> Settings:
    """A tokenizer's settings as both read them.

    Args:
        settings: as transformers 5 writes them.
        of_its_class: what it has `OF_ITS_CLASS`; None where there is no tokenizer.json, and the class has to stay.
    """
    found = {name: value for name, value in settings.items() if name not in OF_OUR_CALL}
    if of_its_class is not None:
        # the one class of 4.57 that takes tokenizer.json as it is: others put a token before or after
        found |= {"tokenizer_class": "PreTrainedTokenizerFast", **of_its_class}
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def _rewrite(path: Path, change: Callable[[Settings], Settings]) -> None:
    """A JSON file as transformers writes them; another file than before, which another folder may share."""
    content = json.dumps(change(read_json(path)), indent=2, sort_keys=True, ensure_ascii=False)
    write_text(path, content + "\n")
