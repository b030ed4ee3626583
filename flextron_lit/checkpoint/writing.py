"""Writing a Flextron checkpoint: whole, sealed by digests, sharing what did not change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flextron_lit.checkpoint.folder import (
    COMPENSATION,
    EVALUATIONS,
    FORMAT_VERSION,
    MAX_SHARD_SIZE,
    RECORD,
    StageRecord,
    is_flextron,
    read,
    read_record,
    record_digest,
)
from flextron_lit.files.digest import sha256_of
from flextron_lit.files.places import ORDER, today
from flextron_lit.files.whole_file import json_text, whole_file, write_json
from flextron_lit.files.whole_folder import files_in, write_whole
from flextron_lit.space import ElasticSpace

UNSEALED = "unsealed"
"""In the record: files that others may write anew without that being damage."""

if TYPE_CHECKING:
    # only writing needs them, and importing them takes seconds that reading should not cost
    from transformers import PreTrainedTokenizerBase

    from flextron_lit.elastic import ElasticBackbone


def write(
    folder: Path,
    backbone: ElasticBackbone,
    tokenizer: PreTrainedTokenizerBase,
    *,
    order: Sequence[Tensor],
    history: Sequence[Mapping[str, Any] | StageRecord],
    files: Mapping[str, Path | bytes] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    among_others: bool = False,
) -> None:
    """Write the folder whole or not at all: a sibling is filled, then renamed into place.

    Args:
        folder: target; an existing one is replaced.
        backbone: the elastic network; its full weights are written.
        tokenizer: its tokenizer.
        order: per block, the unit of the dense model that now stands at each position.
        history: records of all stages so far.
        files: further files, such as cost tables: path in the folder, and its content or where it is copied from.
        state_dict: weights, where the live parameters are sharded; those of narrower widths may be among them.
        max_shard_size: of a weight file; larger networks are written in several.
        among_others: the folder is other programs' too (a Trainer's, say): files that no checkpoint wrote stay, and
            the tokenizer's may be written anew without that being damage.

    Raises:
        ValueError: if the folder cannot be written, the disk is full, or something sits on the network that the folder
            would not hold; an earlier checkpoint stays as it was.
    """
    from flextron_lit.checkpoint.plain_folder import save_model, save_tokenizer

    backbone.refuse_foreign()
    given = dict(state_dict or {})
    if given:
        _check_names(given, backbone)
    weights = given.values() or backbone.model.parameters()
    with write_whole(folder, size=sum(weight.nbytes for weight in weights)) as partial:
        save_model(partial, backbone.model, given or None, max_shard_size)
        network = files_in(partial).keys()
        save_tokenizer(partial, tokenizer)
        rewritable = files_in(partial).keys() - network if among_others else set()
        named = {b.name: o.to(torch.int32).contiguous() for b, o in zip(backbone.space.blocks, order, strict=True)}
        _save(named, partial / ORDER)
        _save(_compensation(backbone, given), partial / COMPENSATION)
        _add(partial, files or {})
        _write_record(partial, _record(backbone.space, history), unsealed=rewritable)
        if among_others:
            _keep_others(folder, partial)


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
    from flextron_lit.checkpoint.plain_folder import bring_up

    known, before = read(source), read_record(source)
    noted = {today(name): sha256 for name, sha256 in before.get("sha256", {}).items()}
    replaced = (RECORD, *files)
    there = {today(name): path for name, path in files_in(source).items()}
    kept = {name: path for name, path in there.items() if name not in replaced and not name.startswith(without)}
    with write_whole(folder, size=sum(path.stat().st_size for path in kept.values())) as partial:
        for name, path in kept.items():
            _link(path, partial / name)
        rewritten = bring_up(partial) if before["format_version"] < FORMAT_VERSION else set()
        _add(partial, files)
        record = _record(known.space, known.history if history is None else history)
        # what was noted before, so that damage since then is still noticed
        _write_record(partial, record, {name: noted[name] for name in noted.keys() & kept.keys() - rewritten})


def note_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Note in the record what an evaluation found, in place of what was noted of the same `file`.

    A file in the folder that the checkpoint lies in is noted relative to it: both may move. The record's time stays: it
    says when the checkpoint was made.

    Raises:
        ValueError: if the folder is no Flextron checkpoint.
        OSError: if it cannot be written.
    """
    record = read_record(folder)
    file, above = Path(evaluation["file"]).absolute(), folder.absolute().parent
    name = str(file.relative_to(above) if file.is_relative_to(above) else file)
    others = [each for each in record.get(EVALUATIONS, []) if each["file"] != name]
    noted = {**record, EVALUATIONS: [*others, {**evaluation, "file": name}]}
    if "sha256" in record:
        noted["sha256"] = {**record["sha256"], RECORD: record_digest(noted)}
    made = (folder / RECORD).stat()
    with whole_file(folder / RECORD) as partial:
        partial.write_text(json_text(noted), encoding="utf-8")
        os.utime(partial, ns=(made.st_atime_ns, made.st_mtime_ns))


def _check_names(state_dict: Mapping[str, Tensor], backbone: ElasticBackbone) -> None:
    model = backbone.model
    needed = set(model.state_dict()) - set(backbone.compensations) - set(model.all_tied_weights_keys)
    missing = sorted(needed - set(state_dict))
    foreign = sorted(set(state_dict) - set(model.state_dict()))
    if missing or foreign:
        raise ValueError(
            f"the state dict is not that of this network: {len(missing)} weights are missing {missing[:2]}, "
            f"{len(foreign)} are unknown {foreign[:2]}"
        )


def _keep_others(folder: Path, partial: Path) -> None:
    """Link what other programs wrote into a folder into the one that takes its place."""
    if not folder.is_dir():
        return
    record = read_record(folder) if is_flextron(folder) else {}
    own = {*record.get("sha256", {}), *record.get(UNSEALED, [])}
    for name, path in files_in(folder).items():
        earlier_weights = Path(name).match("model*.safetensors*") and "/" not in name
        if name not in own and not earlier_weights and not (partial / name).exists():
            _link(path, partial / name)


def _compensation(backbone: ElasticBackbone, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {id(tensor): name for name, tensor in backbone.compensations.items()}
    return {
        f"{elastic.block.name}.{name}": state_dict.get(names[id(tensor)], tensor).detach().contiguous()
        for elastic in backbone.blocks
        for name, tensor in elastic.compensation.named_parameters()
    }


def _save(named: dict[str, Tensor], path: Path) -> None:
    """Nothing where there is nothing."""
    if named:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(named, path)


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


def _write_record(
    folder: Path,
    record: Mapping[str, Any],
    known: Mapping[str, str] | None = None,
    unsealed: Collection[str] = (),
) -> None:
    """Seal the folder, but for some files; `known` digests are of files that another checkpoint shares."""
    files = files_in(folder)
    sealed_files = {name: path for name, path in files.items() if name not in unsealed}
    digests = {name: (known or {}).get(name) or sha256_of(path) for name, path in sealed_files.items()}
    record = {**record, UNSEALED: sorted(unsealed)} if unsealed else record
    sealed = {**record, "sha256": {**digests, RECORD: record_digest(record)}}
    write_json(folder / RECORD, sealed)
    for path in files.values():
        # safetensors makes its files readable by their owner alone, which a checkpoint to share is not
        if path.stat().st_nlink == 1:
            path.chmod((folder / RECORD).stat().st_mode)
