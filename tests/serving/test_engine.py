"""The engine: texts of several budgets at once, slots that come free, a batch that fails."""

import threading

import pytest
import torch

from flextron_lit import FlextronModel
from flextron_lit.serving.asked import Sampling
from flextron_lit.serving.batch import Batch
from flextron_lit.serving.engine import Engine, Job
from flextron_lit.serving.refusal import RequestError
from flextron_lit.serving.telling import Teller
from tests.served import write

GREEDY = Sampling(temperature=0)
PROMPTS = [[3 + place, 40, 50 - place] + [7] * place for place in range(6)]
BUDGETS = (1.0, 0.5, 0.2)
PATIENCE = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return FlextronModel.from_pretrained(write(tmp_path_factory.mktemp("engine") / "flextron"), dtype=torch.float64)


@pytest.fixture
def engine(model):
    made = Engine(model, frozenset(), slots=4, places=2)
    made.start()
    yield made
    made.close()


class Client:
    """Somebody who waits for an answer, and may leave while it comes."""

    def __init__(self, model, prompt=PROMPTS[0], budget=1.0, most=6, leaves=None, sampling=GREEDY):
        self.pieces, self.over, self.leaves, self.engine = [], threading.Event(), leaves, None
        sub_network = model.flextron.answer(budget).sub_network
        self.job = Job(prompt, sub_network, most, sampling, Teller(lambda tokens: "." * len(tokens)), self.hear)

    def hear(self, piece):
        self.pieces.append(piece)
        if len(self.pieces) == self.leaves:
            self.engine.leave(self.job)
        if piece.end or len(self.pieces) == self.leaves:
            self.over.set()

    def ask(self, engine):
        self.engine = engine
        engine.submit(self.job)
        return self

    def answer(self):
        assert self.over.wait(PATIENCE)
        return self.job.tokens


def alone(model, prompt, budget, tokens=6):
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    return model.generate(torch.tensor([prompt]), budget=budget, **settings)[0, len(prompt) :].tolist()


def until(what):
    ticks = threading.Event()
    for _ in range(PATIENCE * 100):
        if what():
            return
        ticks.wait(0.01)
    raise AssertionError("it never came to that")


def test_each_text_is_the_one_that_its_budget_gets_alone(model):
    wanted = [(prompt, BUDGETS[place % 3]) for place, prompt in enumerate(PROMPTS)]
    expected = [alone(model, *each) for each in wanted]
    # fewer slots than requests: some join when others have left
    engine = Engine(model, frozenset(), slots=4, places=6)
    engine.start()
    clients = [Client(model, *each).ask(engine) for each in wanted]
    assert [client.answer() for client in clients] == expected
    assert {client.pieces[-1].end for client in clients} == {"length"}
    assert "".join(piece.text for piece in clients[0].pieces) == "." * 6
    engine.close()
    assert (engine.running, engine.waiting, engine.alive) == (0, 0, False)
    # the control: budgets differ
    assert alone(model, PROMPTS[0], 0.2) != expected[0]


def test_an_answer_ends_with_its_token_of_the_end(model):
    text = alone(model, PROMPTS[1], 1.0)
    engine = Engine(model, frozenset(text[3:4]), slots=1, places=1)
    engine.start()
    client = Client(model, PROMPTS[1]).ask(engine)
    assert client.answer() == text[: text.index(text[3]) + 1]
    assert client.pieces[-1].end == "stop"
    engine.close()


def test_a_seed_draws_the_same_whoever_is_beside_it(model, engine):
    sampling = Sampling(seed=5)
    first = Client(model, PROMPTS[2], most=12, sampling=sampling).ask(engine).answer()
    others = [Client(model, PROMPTS[3], most=20, sampling=Sampling()).ask(engine) for _ in range(2)]
    again = Client(model, PROMPTS[2], most=12, sampling=sampling).ask(engine).answer()
    assert again == first
    other = Client(model, PROMPTS[2], most=12, sampling=Sampling(seed=6)).ask(engine).answer()
    assert other != first
    assert all(len(client.answer()) == 20 for client in others)


def test_who_leaves_frees_a_slot_before_the_next_token(model, engine):
    client = Client(model, most=400, leaves=3).ask(engine)
    client.answer()
    until(lambda: engine.running == 0)
    assert len(client.job.tokens) == 3
    # and the engine goes on
    assert len(Client(model).ask(engine).answer()) == 6


def test_no_more_wait_than_may(model):
    engine = Engine(model, frozenset(), slots=1, places=2)
    engine.start()
    with model.backbone.selection.call(model.backbone.space.full()):
        # nobody is answered while the network is taken
        held = [Client(model).ask(engine) for _ in range(3)]
        late = Client(model)
        with pytest.raises(RequestError, match="2 requests wait already") as refused:
            late.ask(engine)
        assert refused.value.status == 429
        until(lambda: (engine.running, engine.waiting) == (1, 2))
        # who leaves makes room
        engine.leave(held[2].job)
        late.ask(engine)
    assert [len(client.answer()) for client in (*held[:2], late)] == [6, 6, 6]
    assert held[2].pieces == []
    engine.close()


def test_what_fails_fails_for_its_batch_alone(model, engine, monkeypatch, capsys):
    step = Batch.step
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "step", lambda *_: step(None, None))
        client = Client(model).ask(engine)
        assert len(client.answer()) == 1
    assert client.pieces[-1].end == "failed"
    assert "error: a batch of 1 failed" in capsys.readouterr().err
    assert len(Client(model).ask(engine).answer()) == 6


def test_a_closed_engine_answers_what_it_has_and_takes_nothing_new(model):
    engine = Engine(model, frozenset(), slots=1, places=5)
    with pytest.raises(RequestError, match="going down"):
        Client(model).ask(engine)
    engine.start()
    clients = [Client(model).ask(engine) for _ in range(3)]
    engine.close()
    assert [len(client.answer()) for client in clients] == [6, 6, 6]
    with pytest.raises(RequestError) as refused:
        Client(model).ask(engine)
    assert refused.value.status == 503
