"""What a Flextron checkpoint holds, without loading it: JSON-able, and at once."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from flextron_lit import checkpoint
from flextron_lit.checkpoint.location import Location
from flextron_lit.checkpoint.weights import OUTPUT, Header, Weights, count_parameters
from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.places import SURROGATE, file_of
from flextron_lit.files.whole_folder import files_in
from flextron_lit.space import KINDS, ElasticSpace

CONFIG_KEYS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
}
"""Hugging Face's nouns, and what older configs call them."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
ROUTERS = "routers/"
EXCESS = "elastic/excess_losses.json"
STALE, META = "stale_since", "flextron"
"""As the room `routers` has them, which would bring transformers along: seconds that a look should not take."""


def describe(location: Location, *, verify: bool = True) -> dict[str, Any]:
    """All that the files say, JSON-able.

    Args:
        location: the checkpoint.
        verify: compare every file with its sha256.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    folder = location.checkpoint
    record = checkpoint.read(folder)
    verified = checkpoint.verify(folder) if verify else None
    full = Weights(folder).headers
    files = {name: path.stat().st_size for name, path in files_in(folder).items()}
    surrogate = file_of(folder, SURROGATE)
    return {
        "checkpoint": str(folder),
        "run_folder": None if location.run_folder is None else str(location.run_folder.path),
        "model": _model(folder, record.space, full) | _compensation(folder, full),
        "space": {"groups": _groups(record.space), "num_sub_networks": record.space.num_sub_networks},
        "costs": [name for name in files if name.startswith("costs/")],
        "routers": [name for name in files if name.startswith(ROUTERS)],
        "stale": _stale(folder),
        "surrogate": str(surrogate.relative_to(folder)) if surrogate.is_file() else None,
        "excess_losses": EXCESS if EXCESS in files else None,
        "history": record.history,
        "evaluations": checkpoint.evaluations(folder),
        "files": files,
        "bytes": sum(files.values()),
        "verified": verified,
    }


def _stale(folder: Path) -> dict[str, str]:
    """Surrogate and routers that a later stage made stale: file and stage.

    Raises:
        ValueError: if a file is damaged.
    """
    stale = {}
    for path in (file_of(folder, SURROGATE), *sorted(folder.glob(f"{ROUTERS}*.json"))):
        stage = _settings(path).get(STALE) if path.is_file() else None
        if stage:
            stale[str(path.relative_to(folder))] = stage
    return stale


def _settings(path: Path) -> dict[str, Any]:
    """How a surrogate or a router was trained."""
    what = "surrogate" if path.name == Path(SURROGATE).name else "router"
    with damage(path, f"train the {what} again"):
        if what == "router":
            return dict(read_json(path)["settings"])
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads(file.metadata()[META])["settings"])


def _model(folder: Path, space: ElasticSpace, headers: Mapping[str, Header]) -> dict[str, Any]:
    with damage(folder / checkpoint.CONFIG, checkpoint.MEND):
        return _shape(checkpoint.read_config(folder), space, headers)


def _shape(config: Mapping[str, Any], space: ElasticSpace, headers: Mapping[str, Header]) -> dict[str, Any]:
    full = {kind: max(block.full for block in space.blocks if block.kind == kind) for kind in KINDS}
    # a config need not say what its class does by default
    tied = bool(config.get("tie_word_embeddings", OUTPUT not in headers))
    parameters = count_parameters(headers, tied=tied)
    return {
        "class": ", ".join(config.get("architectures") or ["unknown"]),
        "dtype": sorted({DTYPES.get(header.dtype, header.dtype) for header in headers.values()}),
        "num_hidden_layers": len({block.layer for block in space.blocks}),
        **{name: next((config[k] for k in keys if k in config), None) for name, keys in CONFIG_KEYS.items()},
        "num_key_value_heads": full["attention"],
        "intermediate_size": full["mlp"],
        "tie_word_embeddings": tied,
        "num_parameters": sum(parameters.values()),
        "num_parameters_by_part": parameters,
    }


def _compensation(folder: Path, full: Mapping[str, Header]) -> dict[str, Any]:
    """What narrower widths have of their own, beside the full network's parameters: number and form."""
    every = Weights(folder, compensation=True).headers
    own = {name: header for name, header in every.items() if name not in full}
    forms = {name.split(".")[-2] for name in own}
    return {
        "num_compensation_parameters": sum(prod(header.shape) for header in own.values()),
        "compensation": ", ".join(sorted(forms)) or "none",
    }


def _groups(space: ElasticSpace) -> list[dict[str, Any]]:
    """Blocks of the same kind and widths, the largest group of a kind first."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for block in space.blocks:
        layers.setdefault((block.kind, block.widths), []).append(block.layer)
    groups = [{"kind": k, "widths": list(w), "layers": numbers} for (k, w), numbers in layers.items()]
    return sorted(groups, key=lambda group: (group["kind"], -len(group["layers"])))
