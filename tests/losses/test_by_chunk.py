"""Losses chunk by chunk are those of all logits at once, and so are their gradients."""

import pytest
import torch
import transformers
from torch import nn

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses import cross_entropy as whole
from flextron_lit.losses.by_chunk import (
    CHUNK_NUMBERS,
    Head,
    Predictions,
    chunk_of,
    cross_entropy,
    losses,
    token_cross_entropy,
)
from flextron_lit.space import SubNetwork
from tests.conftest import SPACE, VOCABULARY, make_gpt2, make_llama

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def labels(tokens):
    made = tokens.clone()
    made[0, 3:7] = -100
    made[1, :9] = -100
    return made


def trained(make, tokens, labels, chunk, teachers, temperature=1.0, **head):
    """Losses of two teachers and the labels, with the gradients of all weights; heads may cap and scale."""
    student, *frozen = (make() for _ in range(1 + len(teachers)))
    for seed, each in enumerate((student, *frozen)):
        torch.manual_seed(seed)
        for parameter in each.parameters():
            nn.init.normal_(parameter, std=0.3)
    predictions, *given = (Predictions.of(each, {"input_ids": tokens}, chunk) for each in (student, *frozen))
    if head:
        predictions, *given = (
            Predictions(each.hidden, Head(each.head.module, **head), each.chunk) for each in (predictions, *given)
        )
    own, terms = losses(predictions, labels, dict(zip(teachers, given, strict=True)), temperature)
    (own + sum(weight * terms[name] for name, weight in teachers.items())).backward()
    assert all(parameter.grad is None for each in frozen for parameter in each.parameters())
    return [own.detach(), *(each.detach() for each in terms.values())], [p.grad for p in student.parameters()]


@pytest.mark.parametrize("make", [make_llama, make_gpt2, lambda: make_llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("teachers", [{}, {"full": 0.5, "original": 2.0}], ids=["language", "distillation"])
@pytest.mark.parametrize("head", [{}, {"cap": 2.0, "scale": 0.5}], ids=["plain", "capped"])
def test_chunks_add_up_to_the_whole(make, tokens, labels, teachers, head):
    of_all, all_gradients = trained(make, tokens, labels, 0, teachers, 2.0, **head)
    for chunk in (1, 7, 36):
        found, gradients = trained(make, tokens, labels, chunk, teachers, 2.0, **head)
        torch.testing.assert_close(found, of_all, **TOLERANCE)
        for one, other in zip(gradients, all_gradients, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    # the control: another label, and another temperature, are seen
    other = labels.clone()
    other[0, 10] = (other[0, 10] + 1) % VOCABULARY
    assert not torch.allclose(trained(make, tokens, other, 7, teachers, 2.0, **head)[0][0], of_all[0], **TOLERANCE)
    if teachers:
        assert not torch.allclose(trained(make, tokens, labels, 7, teachers, 1.0, **head)[0][1], of_all[1], **TOLERANCE)


def test_the_whole_is_that_of_the_logits(model, tokens, labels):
    logits = model(tokens).logits
    for chunk in (None, 0, 5):
        predictions = Predictions.of(model, {"input_ids": tokens}, chunk)
        torch.testing.assert_close(predictions.logits, logits)
        torch.testing.assert_close(cross_entropy(predictions, labels), whole.cross_entropy(logits, labels))
        torch.testing.assert_close(token_cross_entropy(predictions, labels), whole.token_cross_entropy(logits, labels))
    predictions = Predictions.of(model, {"input_ids": tokens})
    assert predictions.at_once
    assert torch.equal(losses(predictions, labels, {})[0], whole.mean_cross_entropy(logits, labels))


def test_nothing_to_predict_gives_zero(model, tokens):
    predictions = Predictions.of(model, {"input_ids": tokens}, 5)
    own, terms = losses(predictions, torch.full_like(tokens, -100), {"full": predictions.detach()})
    assert own == terms["full"] == 0
    own.backward()


def test_a_network_of_its_widths_is_trained_by_chunks(tokens, labels):
    """Tied embeddings, narrower widths, activations recomputed as well, and backward when others are active."""
    gradients = []
    for chunk, checkpointing in ((0, False), (5, False), (5, True)):
        backbone = ElasticBackbone(make_llama(tie_word_embeddings=True), SPACE)
        backbone.model.train()
        if checkpointing:
            backbone.enable_activation_checkpointing()
        with backbone.use(backbone.space.full()), torch.no_grad():
            full = Predictions.of(backbone.model, {"input_ids": tokens}, chunk)
        with backbone.use(SubNetwork((1, 2, 2, 1, 1, 1))):
            own, terms = losses(Predictions.of(backbone.model, {"input_ids": tokens}, chunk), labels, {"full": full})
        (own + terms["full"]).backward()
        gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None})
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[0][name], **TOLERANCE)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most numbers that a tensor has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return found


@pytest.mark.parametrize("chunk", [0, 6])
def test_all_logits_never_stand_at_once(chunk):
    model = make_llama(vocab_size=4000, hidden_size=32)
    ids = torch.randint(0, 4000, (2, 64), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        predictions = Predictions.of(model, {"input_ids": ids}, chunk)
        own, terms = losses(predictions, ids, {"full": predictions.detach()})
        (own + terms["full"]).backward()
    # weights of the embedding are the largest by chunks
    assert largest.numbers == (4000 * 32 if chunk else 2 * 64 * 4000)


def test_a_chunk_is_derived_from_the_vocabulary():
    assert chunk_of(None, 49152, 2048) == CHUNK_NUMBERS // 49152 == 682
    assert chunk_of(None, 2 * CHUNK_NUMBERS, 8) == 1
    assert chunk_of(0, 49152, 2048) == 2048
    assert chunk_of(10, 49152, 2048) == 10


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (None, 1.0)),
        ({"final_logit_softcapping": 30.0}, (30.0, 1.0)),
        ({"logits_scaling": 4.0}, (None, 0.25)),
        ({"logit_scale": 0.5}, (None, 0.5)),
    ],
)
def test_heads_cap_and_scale_as_configs_say(config, expected):
    model = make_llama()
    for name, value in config.items():
        setattr(model.config, name, value)
    head = Head.of(model)
    assert (head.cap, head.scale) == expected


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma2Config(**TINY, final_logit_softcapping=0.5),
        transformers.GraniteConfig(**TINY, logits_scaling=4.0),
        transformers.CohereConfig(**TINY, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_of_the_library_that_cap_and_scale(config, tokens):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    predictions = Predictions.of(model, {"input_ids": tokens})
    torch.testing.assert_close(predictions.logits, model(tokens).logits)
    assert not torch.allclose(predictions.head.module(predictions.hidden), model(tokens).logits)
