"""Text that a network writes itself, to calibrate and to train on."""

import pytest
import torch

from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.cross_entropy import mean_cross_entropy
from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.conversion import convert
from flextron_lit.stages.written_batches import WrittenBatches
from flextron_lit.stages.written_text import with_labels, written
from tests.conftest import SPACE, make_llama
from tests.options import seed
from tests.served import TINY
from tests.stages.training import PLAN, Gradients, Plan, fit, stage, sum_of_losses


def sayer(token):
    """A network that always says the same."""
    model = make_llama(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[token] = 1e3
    return ElasticBackbone(model, SPACE)


@pytest.mark.parametrize(("block_size", "blocks", "length"), [(128, 2, 128), (256, 1, 128), (24, 9, 24)])
def test_texts_fill_blocks_and_begin_anew(block_size, blocks, length):
    backbone = ElasticBackbone(make_llama(max_position_embeddings=256), SPACE)
    drawn = torch.random.get_rng_state()
    found = written(backbone, 200, block_size, seed=seed(1))
    assert {each.shape for each in found.values()} == {torch.Size([blocks, block_size])}
    positions = torch.arange(length).repeat(block_size // length)
    assert all(torch.equal(row, positions) for row in found["position_ids"])
    # the same again, whatever else draws
    assert torch.equal(torch.random.get_rng_state(), drawn)
    torch.rand(1)
    assert torch.equal(written(backbone, 200, block_size, seed=seed(1))["input_ids"], found["input_ids"])
    assert not torch.equal(written(backbone, 200, block_size, seed=seed(1) + 1)["input_ids"], found["input_ids"])


def test_behind_the_first_token_it_says_what_the_network_says():
    ids = written(sayer(7), 96, 24)["input_ids"]
    assert (ids[:, 1:] == 7).all()
    # no end, and nothing of a model's own settings
    backbone = sayer(7)
    backbone.model.generation_config.eos_token_id = 7
    backbone.model.generation_config.num_beams = 4
    assert torch.equal(written(backbone, 96, 24)["input_ids"], ids)


@pytest.mark.parametrize("importance", ["greedy", "magnitude"])
def test_orders_and_projections_are_of_both(importance):
    text = TextDataModule({"made": TextDomain(source="generated:200,0")}, TINY, block_size=32)
    text.prepare_data()
    # its tokens have to be the network's
    backbone = ElasticBackbone(make_llama(vocab_size=260), SPACE)
    settings = {"tokens": 256, "excess_tokens": 128, "importance": importance}
    one = convert(backbone, text, Calibration(**settings))
    other = convert(backbone, text, Calibration(**settings, written=0.5))
    alone, both = one.blocks, other.blocks
    assert one.excess != other.excess
    assert any(not torch.equal(a.order, b.order) for a, b in zip(alone, both, strict=True))
    width = next(iter(alone[1].compensation))
    assert not torch.equal(alone[1].compensation[width], both[1].compensation[width])
    assert alone[1].compensation[width].shape == both[1].compensation[width].shape


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_wrong_share_is_refused(share):
    with pytest.raises(ValueError, match="calibration.written is a share"):
        Calibration(written=share)


def test_every_token_but_the_first_of_a_text_is_predicted():
    backbone = ElasticBackbone(make_llama(), SPACE)
    blocks = with_labels(written(backbone, 48, 24, seed=seed(1)))
    positions = blocks["position_ids"]
    assert torch.equal(blocks["labels"] == -100, positions == 0)
    assert torch.equal(blocks["labels"][positions > 0], blocks["input_ids"][positions > 0])
    # as documents of the training text have it
    text = TextDataModule({"made": TextDomain(source="generated:60,0")}, TINY, block_size=32)
    text.prepare_data()
    batch = next(iter(text.train_dataloader()))
    seen = batch["labels"] != -100
    assert torch.equal(batch["labels"][seen], batch["input_ids"][seen])
    assert not (batch["position_ids"][seen] == 0).any()
    # the first token of a text is drawn: it would cost 1,000 nats
    sayer_blocks = with_labels(written(sayer(7), 96, 24))
    with torch.no_grad():
        logits = sayer(7).model(sayer_blocks["input_ids"], position_ids=sayer_blocks["position_ids"]).logits
    assert mean_cross_entropy(logits, sayer_blocks["labels"]) < 1e-3


@pytest.mark.parametrize(("share", "own"), [(0.0, []), (0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (0.75, [1, 2, 3, 5, 6, 7])])
def test_written_batches_take_the_place_of_a_share(share, own):
    blocks = with_labels({"input_ids": torch.arange(24).view(6, 4), "position_ids": torch.arange(4).repeat(6, 1)})
    batches, loaded = WrittenBatches(share, blocks), {"input_ids": torch.zeros(2, 4)}
    found = [batches.instead(loaded, number) for number in range(8)]
    assert [number for number, each in enumerate(found) if each is not loaded] == own
    rows = [each["input_ids"][:, 0].tolist() for each in found if each is not loaded]
    # one after the other, and from the beginning again
    assert rows == [[0, 4], [8, 12], [16, 20], [0, 4], [8, 12], [16, 20]][: len(own)]
    if own:
        ranks = [batches.instead(loaded, own[0], rank, 3)["input_ids"][:, 0].tolist() for rank in range(3)]
        assert ranks == [[0, 4], [8, 12], [16, 20]]


def test_a_stage_trains_on_what_the_network_wrote():
    kept, module = Gradients(), stage(accumulate=2, written=0.5)
    fit(module, Plan(), kept)
    module.model.load_state_dict(kept.weights, strict=False)
    first, second = kept.batches
    own = module._written.instead(second, 1)
    assert not torch.equal(own["input_ids"], second["input_ids"])
    for batches, same in (([first, own], True), ([first, second], False)):
        expected = sum_of_losses(module, batches, PLAN)
        assert all(torch.allclose(kept.kept[n], g, rtol=1e-4, atol=1e-6) for n, g in expected.items()) == same
    with pytest.raises(ValueError, match="written is a share of the batches"):
        stage(written=1.0)
