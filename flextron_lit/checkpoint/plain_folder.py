"""Network and tokenizer as a plain Hugging Face folder, which transformers 4.57 reads as 5 does."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron_lit.checkpoint.folder import MAX_SHARD_SIZE
from flextron_lit.files.damage import read_json
from flextron_lit.sources.model_files import BESIDE_TOKENIZER, TERMS, pass_on
from flextron_lit.terminal.progress import quiet_transformers

TOKENIZER = "tokenizer.json"
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
    _rewrite(folder / "config.json", lambda config: config | dict(_older(config, model)))
    pass_on(model.name_or_path or "", folder, TERMS)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that gives the same token ids in both, with what other programs read of it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        whole = {name: getattr(tokenizer, name) for name in OF_ITS_CLASS} if (folder / TOKENIZER).is_file() else None
        _rewrite(path, lambda settings: _for_both(settings, whole))
    pass_on(getattr(tokenizer, "name_or_path", ""), folder, BESIDE_TOKENIZER)


def _older(config: Settings, model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Rotary settings by their older names: 4.57 ignores `rope_parameters` without a word."""
    rope = dict(config.get("rope_parameters") or {})
    if not rope or "auto_map" in config:
        return
    for name, older in ROTARY.get(config["model_type"], {"rope_theta": "rope_theta"}).items():
        yield older, rope.pop(name)
    if rope["rope_type"] == "longrope":
        # which 4.57 works out of other numbers
        rotary: Any = model.base_model.rotary_emb
        rope["attention_factor"] = float(rotary.attention_scaling)
        yield "original_max_position_embeddings", rope["original_max_position_embeddings"]
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
    """A JSON file as transformers writes them."""
    content = json.dumps(change(read_json(path)), indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(content + "\n", encoding="utf-8")
