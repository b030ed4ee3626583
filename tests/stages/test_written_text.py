"""Text that a network writes itself, to calibrate on."""

import pytest
import torch

from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.conversion import convert
from flextron_lit.stages.written_text import written
from tests.conftest import SPACE, make_llama
from tests.options import seed
from tests.served import TINY


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


def test_projections_are_solved_from_both():
    text = TextDataModule({"made": TextDomain(source="generated:200,0")}, TINY, block_size=32)
    text.prepare_data()
    # its tokens have to be the network's
    backbone = ElasticBackbone(make_llama(vocab_size=260), SPACE)
    settings = {"tokens": 256, "excess_tokens": 128}
    alone, table = convert(backbone, text, Calibration(**settings))
    both, other = convert(backbone, text, Calibration(**settings, written=0.5))
    assert table != other
    width = next(iter(alone[1].compensation))
    assert not torch.equal(alone[1].compensation[width], both[1].compensation[width])
    assert alone[1].compensation[width].shape == both[1].compensation[width].shape


@pytest.mark.parametrize("settings", [{"written": 1.0}, {"written": -0.1}, {"written": 0.5, "importance": "magnitude"}])
def test_a_wrong_share_is_refused(settings):
    with pytest.raises(ValueError, match=r"calibration.written (is a share|has no effect)"):
        Calibration(**settings)
