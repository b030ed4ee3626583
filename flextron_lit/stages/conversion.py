"""From a dense network to an elastic one without training: order, compensation, excess losses (ours, closed form)."""

from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flextron_lit import checkpoint
from flextron_lit.checkpoint import StageRecord
from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.data import TextDataModule
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.backbone import cache_layers
from flextron_lit.elastic.fisher import output_gradients
from flextron_lit.elastic.reconstruction import Reconstructed, rebuild, reconstruct
from flextron_lit.files.provenance import git_commit, versions
from flextron_lit.routers.excess import FILE, ExcessTable
from flextron_lit.space import KINDS, ElasticSpace, SpaceConfig
from flextron_lit.stages.calibration import Calibration, falling_importance, groups
from flextron_lit.stages.skipped_layers import losses_without
from flextron_lit.stages.written_text import with_labels, written


@dataclass(frozen=True)
class Converted:
    """What conversion works out of a dense network."""

    space: ElasticSpace
    """The given width choices, and those that it adds."""
    blocks: list[Reconstructed]
    """In the order of the space."""
    excess: ExcessTable | None

    def build(self, backbone: ElasticBackbone) -> ElasticBackbone:
        """The network that was found, of the same model, in place."""
        if self.space != backbone.space:
            backbone = ElasticBackbone(backbone.undo(), self.space)
        rebuild(backbone, self.blocks)
        return backbone


def convert(backbone: ElasticBackbone, text: TextDataModule, calibration: Calibration) -> Converted:
    """Work out order and compensation of every block of a dense network on training text, and what its widths lose.

    The network stays as it is; see `Converted.build`.

    Raises:
        ValueError: if a domain does not exist, there is too little text, or what may be skipped is given twice.
    """
    _check_skips(backbone.space, calibration)
    names = calibration.domains or text.domain_names
    blocks = [block for group in groups(text, calibration) for block in text.calibration_batches(*group)]
    whole = {name: torch.cat([block[name] for block in blocks]) for name in ("input_ids", "position_ids")}
    own: dict[str, Tensor] = {}
    if calibration.written:
        own = written(backbone, round(calibration.tokens * calibration.written), whole["input_ids"].shape[1])
        whole = {name: torch.cat([each, own[name].to(each)]) for name, each in whole.items()}
    greedy = calibration.importance == "greedy"
    rows = _rows(own, round(calibration.tokens * calibration.written))
    orders = None if greedy else falling_importance(backbone, text, calibration, rows)
    fisher = None
    if calibration.excess_tokens:
        mine = round(calibration.excess_tokens * calibration.written)
        batches = text.calibration_batches(calibration.excess_tokens - mine, names, batch_size=1)
        batches += _rows(own, mine)
        fisher = output_gradients(backbone, batches, torch.Generator().manual_seed(0))
    found = reconstruct(backbone, whole, orders, calibration.compensation, fisher)
    skipped: dict[int, float] = {}
    if calibration.skips:
        count = round(calibration.skips * (len(backbone.space) // len(KINDS)))
        labelled = [batch if "labels" in batch else with_labels(batch) for batch in batches]
        skipped = losses_without(backbone, labelled, count, cache_layers(backbone.model.config))
    space = skippable(backbone.space, skipped)
    lost = [
        ((each.absent,) if len(block.widths) > len(given.widths) else ()) + tuple(each.excess)
        for each, block, given in zip(found, space.blocks, backbone.space.blocks, strict=True)
        if each.excess is not None and each.absent is not None
    ]
    excess = ExcessTable(tuple(lost), calibration.excess_tokens, skipped) if lost else None
    return Converted(space, found, excess)


def skippable(space: ElasticSpace, layers: Container[int]) -> ElasticSpace:
    """A space in which these layers may be skipped: width 0 in both blocks."""
    return ElasticSpace(tuple(replace(b, widths=(0, *b.widths)) if b.layer in layers else b for b in space.blocks))


def _check_skips(space: ElasticSpace, calibration: Calibration) -> None:
    layers = len(space) // len(KINDS)
    if calibration.skips and not round(calibration.skips * layers):
        least = f"{1 / layers:.2f}"
        raise ValueError(f"calibration.skips {calibration.skips} of {layers} layers is none: set it to {least} or more")
    given = next((block for block in space.blocks if block.widths[0] == 0), None)
    if calibration.skips and given is not None:
        raise ValueError(
            f"calibration.skips {calibration.skips} looks for layers to skip, but the space has width 0, in "
            f"{given.name} for one; leave out one of the two"
        )


def _rows(blocks: dict[str, Tensor], tokens: int) -> list[dict[str, Tensor]]:
    """The first blocks, one a batch, until there are so many tokens."""
    if not blocks:
        return []
    count = -(-tokens // blocks["input_ids"].shape[1])
    return [{name: each[i : i + 1] for name, each in blocks.items()} for i in range(count)]


def convert_model(
    source: str,
    folder: Path,
    text: TextDataModule,
    space: SpaceConfig,
    calibration: Calibration,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Write a Flextron checkpoint of a dense model that answers budgets, without a training step.

    Args:
        source: the dense model.
        folder: the checkpoint to write; an existing one is replaced.
        text: to calibrate on; its datamodule is prepared here.
        space: the width choices.
        calibration: how units are ordered, and narrower widths reconstructed.
        device: where to compute.

    Raises:
        ValueError: if the source is an elastic network already or cannot become one, there is too little text, or the
            folder cannot be written.
    """
    loaded = load_elastic(source, space, device=device)
    if loaded.record is not None:
        raise ValueError(f"{source} is a Flextron checkpoint already: it answers budgets, or can be trained on")
    text.prepare_data()
    backbone = loaded.backbone
    converted = convert(backbone, text, calibration)
    backbone = converted.build(backbone)
    record = StageRecord(
        stage="Conversion",
        steps=0,
        tokens=0,
        seed=None,
        source=source,
        data=text.describe(),
        settings={},
        calibration=asdict(calibration),
        versions=versions(),
        git_commit=git_commit(),
    )
    checkpoint.write(
        folder,
        backbone,
        loaded.tokenizer,
        order=[each.order for each in converted.blocks],
        history=[record],
        files={} if converted.excess is None else {FILE: converted.excess.to_bytes(backbone.space)},
    )
    return replace(loaded, backbone=backbone)
