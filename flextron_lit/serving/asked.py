"""A request's body as what is asked for: read once, checked, nothing passed over in silence."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flextron_lit.serving.refusal import RequestError

NOT_DONE: dict[str, tuple[Any, ...]] = {
    # what each may be, since that is what is done
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
"""Fields of the API that are refused with any other value; null is always the default."""
UNREAD = {"user", "metadata", "safety_identifier"}
"""What clients say of themselves."""
LONGEST_STOPS = 4
"""As many as the API takes."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are the API's."""

    temperature: float = 1.0
    """0 takes the likeliest."""
    top_p: float = 1.0
    seed: int | None = None
    """None draws one."""


@dataclass(frozen=True)
class Asked:
    """What a client asks for."""

    model: str
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]]
    """A text or tokens to go on from, or the messages of a conversation."""
    chat: bool
    most: int | None = None
    """Tokens of the answer; None leaves it to the server."""
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with a count of tokens."""
    budget: str | None = None
    """In the place of the one that the model's name says."""
    least_budget: str | None = None
    """Under load nothing smaller answers."""


def read(body: bytes, *, chat: bool) -> Asked:
    """What the body of a request asks for.

    Raises:
        RequestError: if it cannot be read, or asks for what is not done here.
    """
    try:
        given = json.loads(body)
        # halves of characters, which nothing said of them could be sent back with
        json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise RequestError(400, "the body must be a JSON object")
    left = {name: value for name, value in given.items() if value is not None and name not in UNREAD}
    for name, done in NOT_DONE.items():
        if left.pop(name, done[0]) not in done:
            raise RequestError(400, f"{name} is not done here; leave it out", code="unsupported_parameter", param=name)
    take = _Fields(left)
    sampling = Sampling(
        take("temperature", 1.0, _number(0, 2)), take("top_p", 1.0, _number(0, 1)), take("seed", None, _whole(-(2**63)))
    )
    prompt = take("messages", None, _messages) if chat else take("prompt", None, _prompt)
    if prompt is None:
        name = "messages" if chat else "prompt"
        raise RequestError(400, f"{name} is missing", param=name)
    longest = take("max_tokens", None, _whole(1))
    found = Asked(
        model=take("model", "", _text),
        prompt=prompt,
        chat=chat,
        most=take("max_completion_tokens", longest, _whole(1)),
        sampling=sampling,
        stops=take("stop", (), _stops),
        stream=take("stream", False, _truth),
        usage=take("stream_options", False, _usage),
        budget=take("budget", None, _budget),
        least_budget=take("least_budget", None, _budget),
    )
    for name in left:
        raise RequestError(400, f"{name} is no field of this request", code="unknown_parameter", param=name)
    return found


class _Fields:
    """Takes fields out of a body, each once, so that what is left is unknown."""

    def __init__(self, left: dict[str, Any]) -> None:
        self.left = left

    def __call__(self, name: str, default: Any, check: Callable[[Any], Any]) -> Any:
        if name not in self.left:
            return default
        try:
            return check(self.left.pop(name))
        except ValueError as error:
            raise RequestError(400, f"{name} {error}", param=name) from error


def _number(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}, not {_short(value)}")
        return float(value)

    return check


def _whole(low: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
            raise ValueError(f"must be a whole number of {low} or more, not {_short(value)}")
        return value

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {_short(value)}")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {_short(value)}")
    return value


def _budget(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise ValueError(f"must be a budget such as 0.8, not {_short(value)}")
    return str(value)


def _usage(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise ValueError('must be {"include_usage": true}')
    return bool(value.get("include_usage"))


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > LONGEST_STOPS or not all(isinstance(e, str) and e for e in found):
        raise ValueError(f"must be a text or a list of up to {LONGEST_STOPS}, none of them empty")
    return tuple(found)


def _prompt(value: Any) -> Any:
    # a list of one prompt is that prompt
    one = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list) else value
    if isinstance(one, list) and one and all(isinstance(e, int) and not isinstance(e, bool) for e in one):
        return one
    if not isinstance(one, str) or not one:
        raise ValueError("must be one text or one list of tokens, not empty; send several prompts as requests each")
    return one


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise ValueError("must be a list of messages, not empty")
    return [{"role": _said(each.get("role")), "content": _said(each.get("content"))} for each in value]


def _said(content: Any) -> str:
    """A text, or the texts of its parts one behind the other."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise ValueError("must have roles and contents that are texts; images, sounds and tools are not done here")
    return "".join(part["text"] for part in parts)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
