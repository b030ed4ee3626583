"""Hugging Face's keywords of loading and saving: honoured, or refused with the reason, never passed over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flextron_lit.sources.notation import parse_source

NOT_HERE = "it has no effect here"
HAPPENS_ANYWAY: dict[str, tuple[Any, ...]] = {
    # what each may be, since that is what is done
    "trust_remote_code": (False, None),
    "use_safetensors": (True, None),
    "low_cpu_mem_usage": (True, None),
    "output_loading_info": (False,),
    "ignore_mismatched_sizes": (False,),
    "force_download": (False,),
    "weights_only": (True,),
    "subfolder": ("", None),
    "safe_serialization": (True,),
    "save_peft_format": (True,),
    "save_original_format": (True, False),
    "distributed_checkpoint": (False,),
}
"""None is what Hugging Face's own default is, of most others too."""
WHY = {
    "trust_remote_code": "no code of a model's folder is run; convert the model to a stock class first",
    "quantization_config": "packed weights have no prefix; quantise after export",
    "load_in_4bit": "packed weights have no prefix; quantise after export",
    "load_in_8bit": "packed weights have no prefix; quantise after export",
    "token": "log in with `hf auth login`, or set HF_TOKEN",
    "cache_dir": "set HF_HOME, or FLEXTRON_CACHE for what is made from a source",
    "force_download": "delete the copy in the cache of the Hub",
    "config": "the folder's own is used",
    "subfolder": "name the folder itself",
    "output_loading_info": "weights that do not fit are an error",
    "ignore_mismatched_sizes": "weights that do not fit are an error",
    "use_safetensors": "nothing is unpickled; convert the weights to safetensors",
    "safe_serialization": "nothing is pickled",
    "variant": "a checkpoint has one set of weights",
    "distributed_checkpoint": "a checkpoint is written by one process; gather a full state dict and give that",
    "tp_plan": "an elastic network lies on one device",
}


@dataclass(frozen=True)
class Loading:
    """What was asked for, in our own terms."""

    source: str
    dtype: torch.dtype | None
    """None means that of the weights."""
    device: torch.device | str


def of_loading(
    source: str, dtype: torch.dtype | str | None, device: torch.device | str, options: Mapping[str, Any]
) -> Loading:
    """Read the options of `from_pretrained`.

    Raises:
        ValueError: if one asks for what is not done.
    """
    left = dict(options)
    dtype = left.pop("torch_dtype", dtype)
    revision, local = left.pop("revision", None), left.pop("local_files_only", False)
    placed = left.pop("device_map", None)
    _refuse(left, "from_pretrained")
    hub = revision not in (None, "main") or local
    if hub and parse_source(source).scheme == "hub":
        if local:
            raise ValueError("from_pretrained(local_files_only=True) asks the Hub's cache: set HF_HUB_OFFLINE=1")
        source = f"{source}@{revision}"
    elif revision not in (None, "main"):
        raise ValueError(f"revision={revision!r} has no effect on {source}, which is not on the Hub; leave it out")
    return Loading(source, _dtype(dtype), device if placed is None else _one_device(placed))


def of_saving(options: Mapping[str, Any], *, push_to_hub: bool) -> None:
    """Look at the options of `save_pretrained`.

    Raises:
        ValueError: if one asks for what is not done.
    """
    if push_to_hub:
        raise ValueError("save_pretrained uploads nothing; upload the folder: `hf upload REPOSITORY FOLDER`")
    _refuse(options, "save_pretrained")


def _refuse(options: Mapping[str, Any], call: str) -> None:
    for name, value in options.items():
        allowed = HAPPENS_ANYWAY.get(name, (None,) if name in WHY else ())
        if not any(value is each for each in allowed):
            raise ValueError(f"{call}({name}={value!r}): {WHY.get(name, NOT_HERE)}; leave it out")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype {dtype!r} is none that weights can have, such as float32 or bfloat16, or auto")
    return found


def _one_device(placed: Any) -> torch.device | str:
    """Of a `device_map` with one device."""
    devices = set(placed.values()) if isinstance(placed, Mapping) else {placed}
    if devices == {"auto"}:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if len(devices) > 1 or devices & {"balanced", "balanced_low_0", "sequential", "disk"}:
        raise ValueError(f"device_map={placed!r}: an elastic network lies on one device; name it, or write auto")
    (device,) = devices
    return torch.device("cuda", device) if isinstance(device, int) else device
