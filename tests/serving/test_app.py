"""The routes before an engine that answers at once: codes, forms, the load policy as clients see it."""

import pytest
from starlette.testclient import TestClient

from flextron_lit import FlextronModel
from flextron_lit.serving.app import Rules, Service
from flextron_lit.serving.engine import Piece
from flextron_lit.serving.load_policy import LoadPolicy
from flextron_lit.serving.offer import offer
from flextron_lit.serving.refusal import RequestError
from flextron_lit.serving.tokens import lengths
from tests.served import write

KEY = {"Authorization": "Bearer secret"}


class Engine:
    """Says the same to everybody."""

    alive, running, waiting, refuses = True, 0, 0, None

    def __init__(self, *pieces):
        self.pieces, self.left, self.jobs = pieces, 0, []

    def submit(self, job):
        if self.refuses:
            raise self.refuses
        self.jobs.append(job)
        job.tokens.extend(range(self.pieces[-1].tokens))
        for piece in self.pieces:
            job.hear(piece)

    def leave(self, job):
        self.left += 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # without a chat template
    return FlextronModel.from_pretrained(write(tmp_path_factory.mktemp("app") / "flextron"))


@pytest.fixture
def served(model):
    """An engine and a client of it."""
    engine = Engine(Piece("Hi", 1), Piece("", 2), Piece(" you", 3, "stop"))
    offered = offer(model, "owl", ["0.6", "1.0", "0.3"], None)
    policy = LoadPolicy(offered.find("0.6"), requests=4)
    service = Service(model, offered, engine, Rules(lengths(model, 20, 30), policy, 500, "secret"))
    return engine, TestClient(service.app, headers=KEY, raise_server_exceptions=False)


def ask(client, path="/v1/completions", headers=None, **fields):
    return client.post(path, json={"model": "owl", "prompt": "Hello"} | fields, headers=headers)


def error_of(response):
    return response.status_code, response.json()["error"]["code"], response.json()["error"]["message"]


def test_an_answer_has_the_form_of_the_api(served):
    engine, client = served
    body = ask(client).json()
    assert body["choices"] == [{"index": 0, "text": "Hi you", "logprobs": None, "finish_reason": "stop"}]
    assert (body["object"], body["model"]) == ("text_completion", "owl@1.0")
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert engine.left == 1
    lines = ask(client, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert len(lines) == 5
    assert '"text": "Hi"' in lines[0]
    assert '"usage": {"prompt_tokens": 5, "completion_tokens": 3' in lines[2]
    assert lines[3:] == ["data: [DONE]", ""]
    assert engine.left == 2
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["owl", "owl@1.0", "owl@0.6", "owl@0.3"]
    assert client.get("/v1/models/owl@0.3").json()["budget"] == "0.3"


def test_under_load_a_smaller_budget_answers_and_says_so(served):
    engine, client = served

    def answered(**fields):
        response = ask(client, **fields)
        told = response.json()
        assert told["flextron"] == {
            "asked": response.headers["x-flextron-asked"],
            "budget": response.headers["x-flextron-budget"],
        }
        assert told["model"] == f"owl@{told['flextron']['budget']}"
        return told["flextron"]["asked"], told["flextron"]["budget"]

    assert answered() == ("1.0", "1.0")
    engine.running, engine.waiting = 2, 1
    assert answered() == ("1.0", "0.6")
    assert engine.jobs[-1].sub_network != engine.jobs[0].sub_network
    assert answered(budget=0.3) == ("0.3", "0.3")
    assert answered(least_budget=1.0) == ("1.0", "1.0")
    # it is load until half of that is left
    engine.running, engine.waiting = 2, 0
    assert answered() == ("1.0", "0.6")
    engine.running = 1
    assert answered() == ("1.0", "1.0")
    counted = client.get("/metrics").text
    assert 'flextron_gave_way_total{asked="1.0",budget="0.6"} 2.0' in counted
    assert "flextron_running 1.0" in counted


def test_every_refusal_has_its_code(served):
    engine, client = served
    assert error_of(ask(client, headers={"Authorization": "Bearer guess"}))[:2] == (401, "invalid_api_key")
    assert error_of(client.get("/v1/models", headers={"Authorization": ""}))[0] == 401
    assert error_of(ask(client, model="cat"))[:2] == (404, "model_not_found")
    assert error_of(ask(client, budget=0.7)) == (
        400,
        None,
        "the budget '0.7' is not offered here; there are 1.0, 0.6, 0.3",
    )
    assert error_of(ask(client, prompt="x" * 21))[:2] == (400, "context_length_exceeded")
    assert error_of(ask(client, max_tokens=31))[:2] == (400, "context_length_exceeded")
    assert error_of(ask(client, prompt="x" * 600))[:2] == (413, "too_large")
    assert error_of(ask(client, prompt="x" * 20_000))[0] == 413
    assert error_of(client.post("/v1/completions", content=b'{"prompt": "Hello"}'))[0] == 415
    assert error_of(ask(client, prompt=[1, 9_999_999]))[0] == 400
    assert error_of(ask(client, prompt=[-1]))[0] == 400
    chat = ask(client, "/v1/chat/completions", prompt=None, messages=[{"role": "user", "content": "Hello"}])
    assert error_of(chat)[:2] == (400, "no_chat_template")
    assert error_of(client.get("/v2"))[0] == 404
    assert error_of(client.get("/v1/completions"))[0] == 405
    engine.refuses = RequestError(429, "full", code="queue_full")
    refused = ask(client)
    assert error_of(refused) == (429, "queue_full", "full")
    assert refused.headers["retry-after"] == "1"
    assert engine.jobs == []
    engine.refuses = ZeroDivisionError()
    assert error_of(ask(client))[0] == 500
    engine.alive = False
    assert client.get("/health", headers={"Authorization": ""}).status_code == 503


def test_what_fails_midway_is_told_as_an_error(served):
    engine, client = served
    engine.pieces = (Piece("Hi", 1), Piece("", 1, "failed"))
    assert error_of(ask(client))[:2] == (500, "engine_failed")
    lines = ask(client, stream=True).text.split("\n\n")
    assert '"code": "engine_failed"' in lines[1]
    assert lines[2] == "data: [DONE]"
