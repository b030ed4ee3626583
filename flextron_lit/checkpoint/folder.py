"""The Flextron checkpoint: the folder that every stage reads and writes.

```
config.json, model.safetensors, tokenizer files    a plain Hugging Face checkpoint of the full network
flextron.json                                      format version, space, history, sha256 of every file; evaluations
elastic/order.safetensors                          per block, where the units stood in the dense model
elastic/compensation.safetensors                   what narrower widths have of their own
elastic/excess_losses.json                         what each block loses at each width, computed by conversion
elastic/surrogate.safetensors, costs/, routers/    what later stages and commands add
```

At the top no safetensors file but the full network's weights: loaders take all of them for such. Format 1 had order and
surrogate there, and is read as before.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.digest import sha256_of, sha256_of_json
from flextron_lit.files.places import ORDER, file_of, today
from flextron_lit.files.whole_file import json_text
from flextron_lit.files.whole_folder import files_in
from flextron_lit.space import ElasticSpace

FORMAT_VERSION = 2
RECORD = "flextron.json"
COMPENSATION = "elastic/compensation.safetensors"
CONFIG = "config.json"
EVALUATIONS = "evaluations"
"""In the record; a checkpoint that is made from this one has none of them: they are of other weights or routers."""
WEIGHTS = "model.safetensors"
MAX_SHARD_SIZE = "50GB"
"""Of a weight file; transformers' own default."""
WEIGHT_INDEX = "model.safetensors.index.json"
MEND = "restore or retrain it"
OLDER_NAMES = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "original_max_position_embeddings")
"""What transformers before 5 calls parts of `rope_parameters`."""

TRAIN_WEIGHTS = ("ElasticTraining", "JointTuning")
"""The stages that change the network's weights, as histories name them."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One line of a checkpoint's history: how it was made."""

    stage: str
    """Name of the stage's class."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens seen, over all ranks; a token counts once however many sub-networks trained on it."""
    seed: int | None
    """Seed of the run."""
    source: str
    """The checkpoint or dense model that the stage started from."""
    data: dict[str, Any]
    """What the datamodule says of itself."""
    settings: dict[str, Any]
    """The stage's own arguments."""
    calibration: dict[str, Any] | None
    """How importance was measured, if this stage sorted the weights."""
    versions: dict[str, str]
    """Of Python and the packages that matter."""
    git_commit: str | None
    """Commit of this project, when run from a checkout."""


@dataclass(frozen=True)
class FlextronCheckpoint:
    """What `flextron.json` and the file of orders say; the weights are read by transformers."""

    space: ElasticSpace
    order: list[Tensor]
    history: list[dict[str, Any]]


def is_flextron(folder: Path) -> bool:
    """Whether a folder is a Flextron checkpoint rather than a dense model."""
    return (folder / RECORD).is_file()


def read(folder: Path) -> FlextronCheckpoint:
    """Read everything but the weights, of which only the presence and the headers are checked.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or was written by a newer version, or is damaged.
    """
    record = read_record(folder)
    path = file_of(folder, ORDER)
    _demand(folder, CONFIG, str(path.relative_to(folder)))
    with damage(folder, MEND):
        space = ElasticSpace.from_json(record["space"])
        history = [dict(row) for row in record["history"]]
    with damage(path, MEND):
        order = _order(load_file(path), space)
    for file in weight_files(folder):
        # opening compares the header with the file's length: a cut-off file is noticed without reading it
        with damage(file, MEND), safe_open(file, framework="pt"):
            pass
    return FlextronCheckpoint(space, order, history)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config as it stands in the file, without the class that transformers makes of it.

    Nor with what says for older releases again what `rope_parameters` says.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    with damage(folder / CONFIG, MEND):
        config = dict(read_json(folder / CONFIG))
    repeated = OLDER_NAMES if "rope_parameters" in config else ()
    return {name: value for name, value in config.items() if name not in repeated}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the full network's weights: one, or the shards of a large network.

    Raises:
        ValueError: if one is missing.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / WEIGHT_INDEX).is_file():
        with damage(folder / WEIGHT_INDEX, MEND):
            names = sorted(set(read_json(folder / WEIGHT_INDEX)["weight_map"].values()))
    _demand(folder, *names)
    return [folder / name for name in names]


def read_compensation(folder: Path, space: ElasticSpace) -> list[dict[str, Tensor]] | None:
    """What narrower widths have of their own, a dict a block; None if they have nothing.

    Args:
        folder: the checkpoint.
        space: widths that it lacks are left out.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / COMPENSATION
    if not path.is_file():
        return None
    with damage(path, MEND):
        named = load_file(path)
    found: list[dict[str, Tensor]] = [{} for _ in space.blocks]
    for own, block in zip(found, space.blocks, strict=True):
        kept = {f"{kind}.{width}" for kind in ("projections", "scales") for width in block.widths[:-1]}
        own.update({name: named[f"{block.name}.{name}"] for name in kept if f"{block.name}.{name}" in named})
    return found


def other_files(folder: Path) -> dict[str, Path]:
    """Files beside config, record, order and weights, by their place today: tokenizer, cost tables, routers.

    Raises:
        ValueError: if a weight file is missing.
    """
    network = {CONFIG, RECORD, ORDER, COMPENSATION, WEIGHT_INDEX, *(file.name for file in weight_files(folder))}
    return {today(name): path for name, path in files_in(folder).items() if today(name) not in network}


def verify_small(folder: Path) -> None:
    """As `verify`, of all files that are there but weights: no time, where weights are not read.

    Raises:
        ValueError: if a file is not as it was written.
    """
    weights = {COMPENSATION, *(file.name for file in weight_files(folder))}
    _compare(folder, lambda name: name not in weights and (folder / name).is_file())


def verify(folder: Path) -> list[str]:
    """Compare every file with the sha256 that was noted when it was written. Reads all of them: seconds per GB.

    Returns:
        Names of the files that were compared; none for a checkpoint that was written before digests were noted.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or a file is missing or not as it was written.
    """
    return _compare(folder, lambda _: True)


def _compare(folder: Path, chosen: Callable[[str], bool]) -> list[str]:
    record = read_record(folder)
    with damage(folder, MEND):
        written = {name: str(digest) for name, digest in record.get("sha256", {}).items() if chosen(name)}
    _demand(folder, *written)
    for name, digest in written.items():
        found = record_digest(record) if name == RECORD else sha256_of(folder / name)
        if found != digest:
            raise ValueError(
                f"{folder / name} is damaged: its sha256 is {found}, but {digest} was written; {MEND}, "
                f"or, if you changed the file yourself, remove the key sha256 from {RECORD}"
            )
    return list(written)


def digest(folder: Path) -> str:
    """Digest of everything that a checkpoint was written with, weights and routers above all, but not of the record.

    Raises:
        ValueError: if the folder is no Flextron checkpoint.
    """
    written = {name: sha256 for name, sha256 in read_record(folder).get("sha256", {}).items() if name != RECORD}
    # written before digests were noted
    known = written or {file.name: sha256_of(file) for file in weight_files(folder)}
    return sha256_of_json(known)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `note_evaluation` noted; `file` is where it lies as seen from here.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or the record is damaged.
    """
    with damage(folder, MEND):
        noted = read_record(folder).get(EVALUATIONS, [])
        return [{**each, "file": str(folder.parent / each["file"])} for each in noted]


def read_record(folder: Path) -> dict[str, Any]:
    """What `flextron.json` holds.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or was written by a newer version, or is damaged.
    """
    if not is_flextron(folder):
        raise ValueError(f"{folder} is no Flextron checkpoint: it has no {RECORD}")
    with damage(folder, MEND):
        record = read_json(folder / RECORD)
        version = record["format_version"]
        newer = version > FORMAT_VERSION
    if newer:
        raise ValueError(f"{folder} has format {version}, this program reads up to {FORMAT_VERSION}: upgrade it")
    return record


def _demand(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: it has no {name}; {MEND}")


def _order(stored: Mapping[str, Tensor], space: ElasticSpace) -> list[Tensor]:
    order = [stored[block.name].long() for block in space.blocks]
    for block, units in zip(space.blocks, order, strict=True):
        # of its length first: what is wrong may be so large that making it fills the memory
        if units.shape != (block.full,) or not torch.equal(units.sort().values, torch.arange(block.full)):
            raise ValueError(f"{block.name} is not an order of {block.full} units")
    return order


def record_digest(record: Mapping[str, Any]) -> str:
    """Of everything in `flextron.json` but the digests themselves."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    # through JSON once, so that a tuple or an integer key counts as what it will be read as
    return sha256_of_json(json.loads(json_text(content)))
