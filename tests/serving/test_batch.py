"""Sequences that share a cache: each text is the one that its prompt gets alone, whoever comes and goes beside it."""

import pytest
import torch

from flextron_lit.serving.batch import Batch
from tests.conftest import VOCABULARY, elastic_pair
from tests.options import seed

LENGTHS = (3, 11, 6)
NEW = 7


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(seed(11))
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


class Run:
    """Greedy decoding of several prompts; `steps` by name in the order in which they joined."""

    def __init__(self, model):
        self.batch, self.rows, self.said = Batch(model), [], {}

    def join(self, name, prompt):
        self.rows.append(name)
        self.said[name] = [int(self.batch.join(prompt).argmax())]

    def step(self, count=1):
        for _ in range(count):
            logits = self.batch.step([self.said[name][-1] for name in self.rows])
            for name, token in zip(self.rows, logits.argmax(-1).tolist(), strict=True):
                self.said[name].append(token)

    def leave(self, *names):
        rows = [row for row, name in enumerate(self.rows) if name not in names]
        self.rows = [self.rows[row] for row in rows]
        self.batch.keep(rows)


def alone(backbone, prompt):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return backbone.model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


def test_texts_are_those_of_each_prompt_alone(model, prompts):
    _, backbone = elastic_pair(model)
    # so that no rounding decides
    backbone.model.double()
    space = backbone.space
    for sub_network in (space.full(), space.uniform(mlp=0.5, attention=0.5), space.smallest()):
        with backbone.selection.call(sub_network):
            expected = [alone(backbone, prompt) for prompt in prompts]
            run = Run(backbone.model)
            run.join(0, prompts[0])
            run.step(2)
            # a longer one beside a shorter one, then a shorter one
            run.join(1, prompts[1])
            run.step()
            run.join(2, prompts[2])
            run.step(3)
            run.leave(0)
            run.step(2)
            run.leave(1)
            run.step()
            assert len(run.batch) == 1
        assert [run.said[name][:NEW] for name in range(3)] == [
            text[: len(run.said[n])] for n, text in enumerate(expected)
        ]
        assert len(run.said[2]) == NEW
        run.leave(2)
        assert len(run.batch) == 0


def test_who_leaves_takes_the_padding_along(model, prompts):
    _, backbone = elastic_pair(model)
    run = Run(backbone.model)
    for name, prompt in enumerate(prompts):
        run.join(name, prompt)
    assert run.batch._real.shape == (3, 11)
    run.leave(1)
    assert run.batch._real.sum(1).tolist() == [3, 6]
    assert run.batch._real.shape == (2, 6)
    assert {layer.keys.shape[:3:2] for layer in run.batch._cache.layers} == {(2, 6)}


def test_padding_that_is_seen_is_another_text(model, prompts):
    _, backbone = elastic_pair(model)
    found = []
    for seen in (False, True):
        run = Run(backbone.model.double())
        run.join(0, prompts[0])
        run.join(1, prompts[1])
        if seen:
            run.batch._real[:] = 1
        found.append(run.batch.step([5, 6]))
    assert float((found[0][0] - found[1][0]).abs().max()) > 1e-3
    assert torch.equal(found[0][1], found[1][1])
