"""`python main.py serve` as its users meet it: a process, and OpenAI's own client."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time

import httpx2 as httpx
import openai
import pytest

from flextron_lit.commands import main, serve
from tests.data.chat import CHATML
from tests.front_door import ROOT, Started
from tests.served import write

KEY = "secret"
NAMES = ("owls@1.0", "owls@0.6", "owls@0.2")
OPTIONS = ("--name", "owls", "--budgets", "1.0", "0.6", "0.2", "--dtype", "float64", "--port", "0")
LIMITS = ("--max_body_bytes", "20000", "--max_answer_tokens", "480", "--slots", "4", "--load_budget", "0.2")
LONG = "stream=True, max_tokens=40"
PATIENCE = 60
QUESTIONS = [f"What does owl {place} eat{'?' * place}" for place in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("serve") / "flextron", chat_template=CHATML)


class Server:
    """The process, when it listens."""

    def __init__(self, folder, place):
        self.files = [place / name for name in ("stdout", "stderr")]
        for path in self.files:
            path.touch()
        arguments = ("serve", "--checkpoint", folder, *OPTIONS, *LIMITS, "--load_requests", "100")
        self.process = Started(arguments, {serve.KEY: KEY}, *self.files)
        found = self.until(lambda: re.search(r"http://127\.0\.0\.1:\d+", self.said()))
        self.url = found[0]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def said(self):
        return "".join(path.read_text() for path in self.files)

    def until(self, what):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            found = what()
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"it never came to that: {self.said()}")

    def chat(self, question, model=NAMES[0], **settings):
        settings = {"max_tokens": 10, "temperature": 0} | settings
        return self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], **settings
        )

    def text(self, *arguments, **settings):
        return self.chat(*arguments, **settings).choices[0].message.content

    def at_rest(self):
        health = httpx.get(f"{self.url}/health").json()
        return (health["running"], health["waiting"]) == (0, 0)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    made = Server(folder, tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def alone(server):
    """Every question at every budget, one after the other."""
    return {(question, name): server.text(question, name) for question in QUESTIONS for name in NAMES}


# --- answers ----------------------------------------------------------------------------------------------------


def test_it_says_where_it_is_and_how_to_ask(server):
    first, second = server.said().splitlines()[:2]
    assert first == f"serving {', '.join(NAMES)} at {server.url}/v1 (Ctrl-C ends it)"
    assert second.split()[:2] == ["curl", f"{server.url}/v1/chat/completions"]
    assert "Authorization: Bearer $FLEXTRON_API_KEY" in second
    body = json.loads(re.search(r"-d '(.*)'$", second)[1])
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(second.split()[1], json=body, headers=headers, timeout=PATIENCE).status_code == 200


def test_three_budgets_are_three_models(server, alone):
    assert [model.id for model in server.client.models.list()] == ["owls", *NAMES]
    assert len({alone[QUESTIONS[0], name] for name in NAMES}) == 3
    asked = server.chat(QUESTIONS[0], "owls", extra_body={"budget": 0.6})
    assert asked.model == "owls@0.6"
    assert asked.choices[0].message.content == alone[QUESTIONS[0], "owls@0.6"]
    assert (asked.usage.completion_tokens, asked.choices[0].finish_reason) == (10, "length")


def test_a_completion_goes_on_from_its_prompt(server):
    settings = {"model": NAMES[1], "max_tokens": 10, "temperature": 0}
    text = server.client.completions.create(prompt="The owl", **settings)
    assert text.usage.prompt_tokens == 7
    streamed = server.client.completions.create(prompt="The owl", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text


def test_a_stream_is_the_same_text(server, alone):
    chunks = list(server.chat(QUESTIONS[1], NAMES[1], stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == alone[QUESTIONS[1], NAMES[1]]
    assert chunks[-1].usage.completion_tokens == 10
    assert {chunk.model for chunk in chunks} == {NAMES[1]}


def test_a_seed_and_a_stop_are_of_the_request(server):
    drawn = [server.text(QUESTIONS[2], temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    text = server.text(QUESTIONS[2], max_tokens=60)
    # the first letter behind the beginning that has not been said before
    end = next(place for place in range(2, len(text)) if text[place] not in text[:place] and text[place].isascii())
    stopped = server.chat(QUESTIONS[2], max_tokens=60, stop=text[end])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (text[:end], "stop")


def test_the_client_of_the_page_works_as_it_is_written(server, capsys):
    (page,) = re.findall(r"```python\n(from openai.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    here = {"http://127.0.0.1:8000": server.url, "none": KEY, "joint_tuning": "owls", "0.8": "0.6", "stream=True": LONG}
    for written, here_it_is in here.items():
        assert written in page
        page = page.replace(written, here_it_is)
    found = {}
    exec(page, found)
    assert found["answer"].model == "owls@0.6"
    assert str(["owls", *NAMES]) in capsys.readouterr().out


def test_eight_clients_at_once_get_their_own_texts(server, alone):
    found = {}

    def client(place):
        for turn in range(6):
            asked = QUESTIONS[(place + turn) % 8], NAMES[(place + 2 * turn) % 3]
            found[place, turn] = server.text(*asked) == alone[asked]

    threads = [threading.Thread(target=client, args=(place,), daemon=True) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == {(place, turn): True for place in range(8) for turn in range(6)}


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "ask"),
    [
        (openai.NotFoundError, lambda s: s.text("Hi", "owls@0.7")),
        (openai.BadRequestError, lambda s: s.text("Hi", extra_body={"budget": 0.7})),
        (openai.BadRequestError, lambda s: s.text("Hi", n=2)),
        (openai.BadRequestError, lambda s: s.text("Hi", max_tokens=1000)),
        (openai.BadRequestError, lambda s: s.text("Hi" * 1000)),
        (openai.AuthenticationError, lambda s: s.client.with_options(api_key="guess").models.list()),
    ],
)
def test_a_wrong_request_is_the_clients_error(server, error, ask):
    with pytest.raises(error) as raised:
        ask(server)
    assert raised.value.body["message"]
    assert server.at_rest()


def test_a_body_too_long_is_refused_whole(server):
    with pytest.raises(openai.APIStatusError) as raised:
        server.text("x" * 200_000)
    assert raised.value.status_code == 413


def test_a_client_that_leaves_frees_its_slot(server, alone):
    for stream in (True, False):
        # more than there are slots
        for _ in range(6):
            body = {
                "model": "owls",
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 450,
                "stream": stream,
            }
            content = json.dumps(body | {"temperature": 0}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: owl\r\nAuthorization: Bearer {KEY}\r\n"
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), PATIENCE) as line:
                line.sendall(
                    f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
                )
                if stream:
                    assert line.recv(15) == b"HTTP/1.1 200 OK"
        server.until(server.at_rest)
    counted = httpx.get(f"{server.url}/metrics").text
    assert 'flextron_requests_total{budget="1.0",end="gone"}' in counted
    assert server.text(QUESTIONS[0]) == alone[QUESTIONS[0], NAMES[0]]
    # nothing of it is worth a line in the log
    assert "Traceback" not in server.said()


def test_sigterm_waits_for_answers_and_ends_well(folder, tmp_path):
    server = Server(folder, tmp_path)
    stream = iter(server.chat("Hi", stream=True, max_tokens=300))
    chunks = [next(stream)]
    os.kill(server.process.pid, signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert server.process.wait(PATIENCE) == 0
    assert server.said().splitlines()[-1] == "ended: every request in the house was answered"
    with pytest.raises(openai.APIConnectionError):
        server.text("Hi")


# --- mistakes of the operator -----------------------------------------------------------------------------------


def complaint(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["main.py", "serve", *map(str, options)])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_port_that_is_taken_is_one_line(folder, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = complaint(monkeypatch, capsys, "--checkpoint", folder, "--port", port)
    assert said.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert "--port" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budgets", "0.001"), "no sub-network meets '0.001'"),
        (("--budgets", "0.6", "quickly"), "cannot read the budget 'quickly'"),
        (("--budgets", "0.6", "0.60"), "--budgets names 0.6 twice"),
        (("--load_budget", "0.5"), "--load_budget must be one of --budgets"),
        (("--load_requests", "3"), "--load_requests has no effect without --load_budget"),
        (("--slots", "0"), "--slots must be 1 or more"),
        (("--name", "a@b"), "--name must be without @"),
        (("--port", "70000"), "cannot listen on 127.0.0.1:70000"),
    ],
)
def test_a_mistake_is_one_line(folder, monkeypatch, capsys, options, message):
    given = (*options, *(("--port", "0") if "--port" not in options else ()))
    assert message in complaint(monkeypatch, capsys, "--checkpoint", folder, *given)


def test_what_is_missing_is_one_line(folder, monkeypatch, capsys, tmp_path):
    assert "no folder" in complaint(monkeypatch, capsys, "--checkpoint", tmp_path / "nothing")
    monkeypatch.setattr(serve, "NEEDED", ("starlette", "no_such_package"))
    said = complaint(monkeypatch, capsys, "--checkpoint", folder)
    assert said == "error: serve needs no_such_package: pip install -r requirements-serve.txt"
    monkeypatch.undo()
    monkeypatch.setenv(serve.KEY, "")
    assert f"{serve.KEY} is empty" in complaint(monkeypatch, capsys, "--checkpoint", folder)


def test_a_name_is_that_of_the_folder():
    assert [serve.name_of(serve.Path(place)) for place in ("runs/quick/flextron", "/tmp/small", "a/b@c")] == [
        "quick",
        "small",
        "b-c",
    ]
