import pytest
import torch

from flextron_lit.evaluation.document_losses import Losses, document_losses, documents, pooled
from flextron_lit.files.digest import fingerprint
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.losses.measured_loss import MeasuredLoss

LENGTHS = (7, 1, 11)


@pytest.fixture
def packed(tokens):
    """Three documents in a block, the second a single token, which predicts nothing."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    block = tokens[:1]
    return {"input_ids": block, "position_ids": positions, "labels": block.masked_fill(positions == 0, IGNORED)}


def narrow(backbone):
    return backbone.space.uniform(mlp=0.5)


def test_a_document_is_where_positions_restart(packed):
    assert documents(packed).tolist() == [[1] * 7 + [2] + [3] * 10]
    del packed["position_ids"]
    assert documents(packed).tolist() == [[0] * 18]


def test_losses_are_those_of_the_documents_alone(backbone, packed):
    full = backbone.space.full()
    together = document_losses(backbone, full, [packed], "packed")
    assert together.tokens.tolist() == [6, 10]
    for number, piece in enumerate((packed["input_ids"][:, :7], packed["input_ids"][:, 8:])):
        alone = document_losses(backbone, full, [{"input_ids": piece, "labels": piece}], "alone")
        torch.testing.assert_close(alone.total, together.total[number : number + 1], rtol=1e-5, atol=1e-5)
    # without positions one document reads the other
    without = {name: packed[name] for name in ("input_ids", "labels")}
    mixed = document_losses(backbone, full, [without], "mixed")
    assert abs(float(mixed.total.sum() - together.total.sum())) > 1e-3


def test_the_mean_is_that_of_measured_losses(backbone, packed, tokens):
    batches = [packed, {"input_ids": tokens, "labels": tokens}]
    for sub_network in (backbone.space.full(), narrow(backbone)):
        found = document_losses(backbone, sub_network, batches, "both")
        assert found.mean == pytest.approx(MeasuredLoss(backbone, batches)(sub_network), rel=1e-5)
    assert found.mean != pytest.approx(MeasuredLoss(backbone, batches)(backbone.space.full()), rel=1e-3)


def test_texts_are_pooled_by_their_tokens():
    one, other = Losses(torch.tensor([2.0]), torch.tensor([1.0])), Losses(torch.tensor([3.0]), torch.tensor([3.0]))
    assert pooled([one, other]).mean == 1.25
    assert (one - one).mean == 0
    with pytest.raises(AssertionError, match="same documents"):
        one - other


def test_a_fingerprint_knows_tokens_and_what_is_predicted(packed):
    same = {name: tensor.clone() for name, tensor in packed.items()}
    assert fingerprint([packed]) == fingerprint([same])
    for name in packed:
        assert fingerprint([packed]) != fingerprint([{**packed, name: packed[name] + 1}])
