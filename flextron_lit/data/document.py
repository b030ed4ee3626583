"""What a document is: plain text, or a conversation whose answers are to be learnt."""

import json
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Message = dict[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn; the last word is the assistant's."""

    place: str
    """File and line, for errors; not part of the content."""
    messages: list[Message]

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


Document = str | Conversation
CALLED: dict[type, str] = {str: "text", list: "messages"}


def content_of(document: Document) -> bytes:
    """What a document's fingerprint is of; its length comes first, since it counts where a document ends."""
    content = (document if isinstance(document, str) else json.dumps(document.messages)).encode()
    return len(content).to_bytes(8, "little") + content


def text_in(place: str, row: Any, field: str) -> str:
    """The text of a row.

    Args:
        place: file and line, for errors.
        row: as it was read, of any type.
        field: key that holds the text.

    Raises:
        ValueError: if there is none; naming what the row has.
    """
    return checked(place, _field(place, row, field, str))


def conversation_in(place: str, row: Any, field: str) -> Conversation:
    """The conversation of a row.

    Args:
        place: file and line, for errors.
        row: as it was read, of any type.
        field: key that holds the messages.

    Raises:
        ValueError: if there is none, or it is no conversation; naming the message.
    """
    given = _field(place, row, field, list)
    messages = [_message(f"{place} message {number},", message) for number, message in enumerate(given, 1)]
    _check_turns(place, [message["role"] for message in messages])
    return Conversation(place, messages)


def checked(place: str, text: str) -> str:
    """The text, if it is one.

    Raises:
        ValueError: if it is blank, or no Unicode text.
    """
    if not text.strip():
        raise ValueError(f"{place} holds no text; take it out")
    return _encodable(place, text)


def _encodable(place: str, text: str) -> str:
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer takes
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds U+{ord(text[error.start]):04X}, half of a surrogate pair: no text") from error
    return text


def _field(place: str, row: Any, field: str, kind: type[T]) -> T:
    """What a row has there, if it is of the kind; an empty list is no messages."""
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, kind) or value == []:
        raise ValueError(f"{place} has no {CALLED[kind]} in field {field!r}; it has {_held(row, field)}")
    return value


def _held(row: Any, field: str) -> str:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}"
    value = row.get(field)
    if isinstance(value, list) and not value:
        return "an empty list there"
    return f"a {type(value).__name__} there" if field in row else ", ".join(row) or "no field"


def _message(place: str, message: Any) -> Message:
    role = text_in(place, message, "role")
    content = _field(place, message, "content", str)
    if role == "assistant":
        checked(place, content)
    # tool calls, weights and the like would change what is to be learnt
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise ValueError(f"{place} has {', '.join(extra)} beside role and content, which has no effect; leave it out")
    return {"role": role, "content": _encodable(place, content)}


def _check_turns(place: str, roles: list[str]) -> None:
    first = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[first:], first):
        expected = ("user", "assistant")[(index - first) % 2]
        if role != expected:
            raise ValueError(
                f"{place} message {index + 1}, is by {role!r} where {expected!r} must speak: a conversation is an "
                "optional system message, then user and assistant in turn"
            )
    if roles[-1] != "assistant":
        raise ValueError(f"{place} ends without an answer of the assistant; there must be one to learn")
