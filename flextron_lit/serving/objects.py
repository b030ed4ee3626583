"""Responses in the form of OpenAI's API: whole answers, and the chunks of a stream."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Response:
    """What is the same in all objects of one answer."""

    name: str
    """Of the answer."""
    created: int
    model: str
    """What answered, which under load may be another than was asked for."""
    chat: bool
    flextron: Mapping[str, Any]
    """The budget that was asked for, and that which answered."""

    def whole(self, text: str, end: str, prompt: int, answer: int) -> Event:
        """The answer at once, with its numbers of tokens."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end}
        return {**self._head(""), "choices": [choice], "usage": usage(prompt, answer), "flextron": dict(self.flextron)}

    def chunk(self, text: str, end: str | None, *, first: bool = False) -> Event:
        """A piece of it."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end}
        told = {"flextron": dict(self.flextron)} if first or end is not None else {}
        return {**self._head(".chunk"), "choices": [choice], **told}

    def count(self, prompt: int, answer: int) -> Event:
        """What a stream ends with that is to be counted."""
        return {**self._head(".chunk"), "choices": [], "usage": usage(prompt, answer)}

    def _head(self, ending: str) -> dict[str, Any]:
        kind = f"chat.completion{ending}" if self.chat else "text_completion"
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def sent(event: Event | str) -> str:
    """An event of a stream, as it goes over the line."""
    return f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"
