"""Export: a sub-network is cut out, written beside its place, read back, compared, and only then put there."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.export import verification
from flextron_lit.export.card import Origin, card
from flextron_lit.export.forms import Form, in_form
from flextron_lit.export.small_model import cut_out
from flextron_lit.export.verification import Verified
from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.whole_file import write_json
from flextron_lit.files.whole_folder import write_whole
from flextron_lit.losses.measured_loss import Batch, MeasuredLoss, mean_loss
from flextron_lit.routers.from_budget import Selection, to_json
from flextron_lit.sources.model_files import TERMS, pass_on
from flextron_lit.space import ElasticSpace, SubNetwork

CARD = "README.md"
RECORD = "sub_network.json"
"""What `select --output` would have written: by it an exported folder is known."""


def read_selection(path: Path, space: ElasticSpace) -> Selection:
    """The sub-network that `select --output` or an earlier export wrote down.

    Raises:
        ValueError: if the file is no such JSON, or is of another space.
    """
    other = "is not what `select --output` writes"
    with damage(path, f"name such a file, or the {RECORD} of an export", what=other):
        record = read_json(path)
        sub_network, widths = SubNetwork.from_json(record["sub_network"]), dict(record["widths"])
        budget, how = str(record["budget"]), str(record["how"])
    for block, width in zip(space.blocks, space.widths(sub_network), strict=True):
        if widths.get(block.name) != width:
            raise ValueError(
                f"{path} was made for another space: there {block.name} has width {widths.get(block.name)}, here the "
                f"same choice is width {width}; select again on this checkpoint"
            )
    return Selection(budget, sub_network, f"{path.name} ({how})", None)


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Look before anything is searched or measured.

    Raises:
        ValueError: if something is there that is not to be replaced, or is no export.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise ValueError(f"{folder} exists; name another place, or replace it with --overwrite")
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has no {RECORD}, so it is no export, and --overwrite does not delete it")


def export(loaded: Loaded, folder: Path, form: Form, origin: Origin, batches: Sequence[Batch]) -> Verified:
    """Write a sub-network as a model of its own, whole and verified or not at all.

    Args:
        loaded: the elastic network, in float32; its weights are rounded to what is written.
        folder: where; an earlier export there is replaced.
        form: what it is to be like.
        origin: which sub-network, and what is known of it.
        batches: text to measure its loss on; none measures none.

    Raises:
        ValueError: if the form cannot hold the sub-network, what was written computes something else, or the folder
            cannot be written; nothing is left then.
    """
    backbone, sub_network = loaded.backbone, origin.selection.sub_network
    elastic_loss = MeasuredLoss(backbone, batches)(sub_network) if batches else None
    with backbone.use(sub_network):
        in_full = verification.logits(backbone.model)
        round_weights(backbone, getattr(torch, form.dtype))
        rounded = verification.logits(backbone.model)
    small = cut_out(backbone, sub_network)
    written = in_form(small, loaded.tokenizer, form, folder.name)
    # the same care as for a checkpoint: a sibling is filled, then renamed into place
    with write_whole(folder, size=sum(p.nbytes for p in small.model.parameters())) as partial:
        written.write(partial)
        model = written.read(partial)
        verification.demand_equal(verification.logits(model), rounded)
        if form.quantize:
            written.quantise(partial)
            model = written.read(partial)
        found = verification.logits(model)
        verified = Verified(
            difference=verification.difference(found, in_full),
            agreement=verification.agreement(found, in_full),
            loss=mean_loss(model, batches) if batches else None,
            elastic_loss=elastic_loss,
        )
        pass_on(loaded.folder, partial, TERMS)
        (partial / CARD).write_text(card(origin, small, folder.name, written, verified), encoding="utf-8")
        write_json(partial / RECORD, to_json(origin.selection, backbone.space, origin.tables))
    return verified


def round_weights(backbone: ElasticBackbone, dtype: torch.dtype) -> None:
    """Round every weight to what a narrower type can hold; they stay in float32.

    So the elastic network computes exactly what its export in that type does, and the two can be compared.
    """
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.copy_(parameter.to(dtype))
