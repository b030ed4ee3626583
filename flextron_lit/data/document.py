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
    """The text of a row; an empty one where the row, or what it has there, is null.

    Args:
        place: file and line, for errors.
        row: as it was read, of any type.
        field: key that holds the text.

    Raises:
        ValueError: if there is no such field, or it holds no text; naming what the row has.
    """
    if isinstance(row, dict) and field not in row and "messages" in row:
        raise ValueError(
            f"{place} has no text in field {field!r}, but messages: set format to chat in a config of texts"
        )
    return "" if _is_null(row, field) else encodable(place, _field(place, row, field, str))


def conversation_in(place: str, row: Any, field: str) -> Document:
    """The conversation of a row; an empty text where there is none, or an answer in it is blank.

    Args:
        place: file and line, for errors.
        row: as it was read, of any type.
        field: key that holds the messages.

    Raises:
        ValueError: if there is no such field, or it holds no conversation; naming the message.
    """
    if _is_null(row, field):
        return ""
    given = _field(place, row, field, list)
    if not given or any(map(_is_blank, given)):
        return ""
    messages = [_message(f"{place} message {number},", message) for number, message in enumerate(given, 1)]
    _check_turns(place, [message["role"] for message in messages])
    return Conversation(place, messages)


def _is_null(row: Any, field: str) -> bool:
    return row is None or (isinstance(row, dict) and field in row and row[field] is None)


def _is_blank(message: Any) -> bool:
    """Whether a message says nothing where something must be said; one with more than role and content may."""
    if not isinstance(message, dict) or "content" not in message or _extra(message):
        return False
    content = message["content"]
    return content is None or (message.get("role") == "assistant" and isinstance(content, str) and not content.strip())


def encodable(place: str, text: str) -> str:
    """The text, if it is Unicode.

    Raises:
        ValueError: if it is not: JSON can spell half of a surrogate pair, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds U+{ord(text[error.start]):04X}, half of a surrogate pair: no text") from error
    return text


def _field(place: str, row: Any, field: str, kind: type[T]) -> T:
    """What a row has there, if it is of the kind."""
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place} has no {CALLED[kind]} in field {field!r}; it has {_held(row, field)}")
    return value


def _held(row: Any, field: str) -> str:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}"
    return f"a {type(row[field]).__name__} there" if field in row else ", ".join(row) or "no field"


def _message(place: str, message: Any) -> Message:
    role = _field(place, message, "role", str)
    content = _field(place, message, "content", str)
    # tool calls, weights and the like would change what is to be learnt
    extra = _extra(message)
    if extra:
        raise ValueError(f"{place} has {', '.join(extra)} beside role and content, which has no effect; leave it out")
    return {"role": role, "content": encodable(place, content)}


def _extra(message: dict[str, Any]) -> list[str]:
    return [key for key, value in message.items() if key not in ("role", "content") and value is not None]


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
