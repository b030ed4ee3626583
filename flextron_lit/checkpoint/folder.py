"""The Flextron checkpoint: the folder that every stage reads and writes.

```
config.json, model.safetensors, tokenizer files    a plain Hugging Face checkpoint of the full network
flextron.json                                      format version, space, history, sha256 of every file; evaluations
order.safetensors                                  per block, where the units stood in the dense model
costs/, routers/, surrogate.safetensors            what later stages and commands add
```
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flextron_lit.files.digest import sha256_of
from flextron_lit.files.whole_file import whole_file
from flextron_lit.space import ElasticSpace

if TYPE_CHECKING:
    # only writing needs them, and importing them takes seconds that reading should not cost
    from transformers import PreTrainedTokenizerBase

    from flextron_lit.elastic import ElasticBackbone

FORMAT_VERSION = 1
RECORD = "flextron.json"
ORDER = "order.safetensors"
CONFIG = "config.json"
EVALUATIONS = "evaluations"
"""In the record; a checkpoint that is made from this one has none of them: they are of other weights or routers."""
WEIGHTS = "model.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
MEND = "restore or retrain it"


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
    """What `flextron.json` and `order.safetensors` say; the weights are read by transformers."""

    space: ElasticSpace
    order: list[Tensor]
    history: list[dict[str, Any]]


# --- reading ----------------------------------------------------------------------------------------------------


def is_flextron(folder: Path) -> bool:
    """Whether a folder is a Flextron checkpoint rather than a dense model."""
    return (folder / RECORD).is_file()


def read(folder: Path) -> FlextronCheckpoint:
    """Read everything but the weights, of which only the presence and the headers are checked.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or was written by a newer version, or is damaged.
    """
    record = _read_record(folder)
    for name in (CONFIG, ORDER):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: it has no {name}; {MEND}")
    with _damage(folder):
        space = ElasticSpace.from_json(record["space"])
        history = [dict(row) for row in record["history"]]
    with _damage(folder / ORDER):
        order = _order(load_file(folder / ORDER), space)
    for file in weight_files(folder):
        # opening compares the header with the file's length: a cut-off file is noticed without reading it
        with _damage(file), safe_open(file, framework="pt"):
            pass
    return FlextronCheckpoint(space, order, history)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config as it stands in the file, without the class that transformers makes of it.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    with _damage(folder / CONFIG):
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the full network's weights: one, or the shards of a large network.

    Raises:
        ValueError: if one is missing.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / WEIGHT_INDEX).is_file():
        with _damage(folder / WEIGHT_INDEX):
            index = json.loads((folder / WEIGHT_INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: it has no {name}; {MEND}")
    return [folder / name for name in names]


def verify(folder: Path) -> list[str]:
    """Compare every file with the sha256 that was noted when it was written. Reads all of them: seconds per GB.

    Returns:
        Names of the files that were compared; none for a checkpoint that was written before digests were noted.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or a file is missing or not as it was written.
    """
    record = _read_record(folder)
    with _damage(folder):
        written = dict(record.get("sha256", {}))
    for name, digest in written.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: it has no {name}; {MEND}")
        found = _record_digest(record) if name == RECORD else sha256_of(folder / name)
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
    written = {name: sha256 for name, sha256 in _read_record(folder).get("sha256", {}).items() if name != RECORD}
    # written before digests were noted
    known = written or {file.name: sha256_of(file) for file in weight_files(folder)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `note_evaluation` noted; `file` is where it lies as seen from here.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or the record is damaged.
    """
    with _damage(folder):
        noted = _read_record(folder).get(EVALUATIONS, [])
        return [{**each, "file": str(folder.parent / each["file"])} for each in noted]


def _read_record(folder: Path) -> dict[str, Any]:
    if not is_flextron(folder):
        raise ValueError(f"{folder} is no Flextron checkpoint: it has no {RECORD}")
    with _damage(folder):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version = record["format_version"]
        newer = version > FORMAT_VERSION
    if newer:
        raise ValueError(f"{folder} has format {version}, this program reads up to {FORMAT_VERSION}: upgrade it")
    return record


def _order(stored: Mapping[str, Tensor], space: ElasticSpace) -> list[Tensor]:
    order = [stored[block.name].long() for block in space.blocks]
    for block, units in zip(space.blocks, order, strict=True):
        if not torch.equal(units.sort().values, torch.arange(block.full)):
            raise ValueError(f"{block.name} is not an order of {block.full} units")
    return order


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what readers of JSON and safetensors raise into one clear error."""
    try:
        yield
    except PermissionError:
        # the file may be whole; the system's message names it
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {MEND}") from error


# --- writing ----------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    backbone: ElasticBackbone,
    tokenizer: PreTrainedTokenizerBase,
    *,
    order: Sequence[Tensor],
    history: Sequence[Mapping[str, Any] | StageRecord],
    files: Mapping[str, Path | bytes] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder whole or not at all: a sibling is filled, then renamed into place.

    Args:
        folder: target; an existing one is replaced.
        backbone: the elastic network; its full weights are written.
        tokenizer: its tokenizer.
        order: per block, the unit of the dense model that now stands at each position.
        history: records of all stages so far.
        files: further files, such as cost tables: path in the folder, and its content or where it is copied from.
        state_dict: full weights, where the live parameters are sharded.

    Raises:
        ValueError: if the folder cannot be written, or the disk is full; an earlier checkpoint stays as it was.
    """

    def fill(partial: Path) -> None:
        _save_model(partial, backbone, tokenizer, state_dict)
        named = {b.name: o.to(torch.int32).contiguous() for b, o in zip(backbone.space.blocks, order, strict=True)}
        save_file(named, partial / ORDER)
        _add(partial, files or {})
        _write_record(partial, _record(backbone.space, history))

    weights = state_dict.values() if state_dict else backbone.model.parameters()
    write_whole(folder, fill, size=sum(weight.nbytes for weight in weights))


def extend(
    source: Path,
    folder: Path,
    *,
    files: Mapping[str, Path | bytes],
    history: Sequence[Mapping[str, Any] | StageRecord] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """Write a checkpoint that differs from another by some files, whole or not at all.

    What stays the same is hard-linked where the disk can, so it takes no room, and keeps the sha256 that was noted.

    Args:
        source: a Flextron checkpoint.
        folder: target, which may be the source itself.
        files: further files, or ones to replace: path in the folder, and its content or where it is copied from.
        history: records of all stages so far; None keeps those of the source.
        without: beginnings of paths to leave out.

    Raises:
        ValueError: if the source is damaged, or the folder cannot be written; an earlier checkpoint stays as it was.
    """
    known = read(source)
    noted = dict(_read_record(source).get("sha256", {}))
    there = {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
    replaced = (RECORD, *files)
    kept = {name: path for name, path in there.items() if name not in replaced and not name.startswith(without)}

    def fill(partial: Path) -> None:
        for name, path in kept.items():
            _link(path, partial / name)
        _add(partial, files)
        record = _record(known.space, known.history if history is None else history)
        # what was noted before, so that damage since then is still noticed
        _write_record(partial, record, {name: digest for name, digest in noted.items() if name in kept})

    write_whole(folder, fill, size=sum(path.stat().st_size for path in kept.values()))


def note_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Note in the record what an evaluation found, in place of what was noted of the same `file`.

    A file in the folder that the checkpoint lies in is noted relative to it: both may move. The record's time stays: it
    says when the checkpoint was made.

    Raises:
        ValueError: if the folder is no Flextron checkpoint.
        OSError: if it cannot be written.
    """
    record = _read_record(folder)
    file, above = Path(evaluation["file"]).absolute(), folder.absolute().parent
    name = str(file.relative_to(above) if file.is_relative_to(above) else file)
    others = [each for each in record.get(EVALUATIONS, []) if each["file"] != name]
    noted = {**record, EVALUATIONS: [*others, {**evaluation, "file": name}]}
    if "sha256" in record:
        noted["sha256"] = {**record["sha256"], RECORD: _record_digest(noted)}
    made = (folder / RECORD).stat()
    with whole_file(folder / RECORD) as partial:
        partial.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
        os.utime(partial, ns=(made.st_atime_ns, made.st_mtime_ns))


def _record(space: ElasticSpace, history: Sequence[Mapping[str, Any] | StageRecord]) -> dict[str, Any]:
    rows = [asdict(row) if isinstance(row, StageRecord) else dict(row) for row in history]
    return {"format_version": FORMAT_VERSION, "space": space.to_json(), "history": rows}


def _add(partial: Path, files: Mapping[str, Path | bytes]) -> None:
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (partial / name).write_bytes(content)
        else:
            shutil.copyfile(content, partial / name)


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # the file itself, where the Hub's cache has a symbolic link to it
        os.link(path.resolve(), target)
    except OSError:
        # another disk, or one without hard links
        shutil.copyfile(path, target)


def write_whole(folder: Path, fill: Callable[[Path], None], *, size: int) -> None:
    """Fill a sibling, then rename it into place: a folder is there whole or not at all.

    Args:
        folder: what is to be there; an existing one is replaced.
        fill: writes the sibling that it is given.
        size: room that it needs at least, in bytes.

    Raises:
        ValueError: if it cannot be written, with the reason; nothing is left then.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write {folder}: a file of that name exists; name another place")
    partial = _sibling(folder, "partial")
    try:
        recover(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        _replace(folder, partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            recover(folder)
        number = _error_number(error)
        if number is None:
            raise
        raise ValueError(_cannot_write(folder, number, size)) from error


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off: bring the old folder back if the new one did not arrive."""
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_model(
    folder: Path,
    backbone: ElasticBackbone,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    from flextron_lit.terminal.progress import quiet_transformers

    with quiet_transformers():
        backbone.model.save_pretrained(folder, state_dict=dict(state_dict) if state_dict else None)
    tokenizer.save_pretrained(folder)


def _write_record(folder: Path, record: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Seal the folder; `known` digests are of files that another checkpoint shares."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: (known or {}).get(name) or sha256_of(path) for name, path in files.items()}
    sealed = {**record, "sha256": {**digests, RECORD: _record_digest(record)}}
    (folder / RECORD).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    for path in files.values():
        # safetensors makes its files readable by their owner alone, which a checkpoint to share is not
        if path.stat().st_nlink == 1:
            path.chmod((folder / RECORD).stat().st_mode)


def _replace(folder: Path, partial: Path) -> None:
    old = _sibling(folder, "old")
    with suppress(FileNotFoundError):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _record_digest(record: Mapping[str, Any]) -> str:
    """Of everything in `flextron.json` but the digests themselves."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    # through JSON once, so that a tuple or an integer key counts as what it will be read as
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _error_number(error: BaseException) -> int | None:
    """The system's number of a failed write; safetensors and tokenizers give it in the text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _cannot_write(folder: Path, number: int, needed: int) -> str:
    reason = os.strerror(number)
    if number not in OUT_OF_SPACE:
        return f"cannot write {folder} ({reason}); name another place, or mend this one"
    disk = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    return (
        f"cannot write {folder} ({reason}): it needs about {needed / 1e6:.1f} MB beside what is there, "
        f"but {free / 1e6:.1f} MB are free; make room, or name another place"
    )


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
