"""Bodies of requests: what they ask for, and that nothing in them is passed over."""

import json

import pytest

from flextron_lit.serving.asked import Asked, Sampling, read
from flextron_lit.serving.refusal import RequestError

HELLO = [{"role": "user", "content": "Hello"}]


def asked(chat=True, **fields):
    given = {"messages": HELLO} if chat else {"prompt": "Hello"}
    return read(json.dumps(given | fields).encode(), chat=chat)


def test_what_is_left_out_is_what_the_api_says():
    assert asked() == Asked("", HELLO, chat=True)
    assert asked(chat=False) == Asked("", "Hello", chat=False)
    assert asked(temperature=None, n=1, tools=None, user="me", top_logprobs=None) == asked()


def test_everything_else_is_read():
    found = asked(
        model="m@0.6",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        budget=0.8,
        least_budget="0.6",
    )
    sampling = Sampling(0.5, 0.9, 3)
    assert found == Asked("m@0.6", HELLO, True, 7, sampling, ("a", "b"), True, True, "0.8", "0.6")
    assert asked(max_tokens=7, max_completion_tokens=5).most == 5
    assert asked(stop="a").stops == ("a",)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert asked(messages=[{"role": "user", "content": parts}]).prompt == HELLO
    assert asked(chat=False, prompt=["Hi"]).prompt == "Hi"
    assert asked(chat=False, prompt=[1, 2]).prompt == asked(chat=False, prompt=[[1, 2]]).prompt == [1, 2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperatur": 1}, "temperatur"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"usage": True}}, "stream_options"),
        ({"budget": True}, "budget"),
        ({"budget": {"answer": 0.6}}, "budget"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, param):
    with pytest.raises(RequestError) as refused:
        asked(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param in refused.value.to_json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, "a"], 3, [[]], [True]])
def test_a_prompt_is_one_text_or_one_list_of_tokens(prompt):
    with pytest.raises(RequestError, match="prompt must be one text or one list of tokens"):
        asked(chat=False, prompt=prompt)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"a"', b'{"model": "\\ud800"}'])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="the body"):
        read(body, chat=True)
