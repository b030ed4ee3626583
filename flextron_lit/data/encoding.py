"""Documents to token ids, and which of a conversation's tokens are its answers."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.document import Conversation, Document
from flextron_lit.files.digest import sha256_of_json

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
"""How a chat template marks what the assistant writes, if it does."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one document."""

    ids: list[int]
    predicted: list[bool] | None = None
    """Whether a token is to be predicted, one a token; None: all are."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a fast tokenizer with all its rules.

    Raises:
        ValueError: for a tokenizer that is not fast, or has no end-of-text token.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; save it with tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which closes every document; set one in its config")
    # encoding turns these two off, so before the first batch they read otherwise than after it
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(f"{json.dumps(rules)}{tokenizer.eos_token_id}".encode()).hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the chat template and of the tokens that it may insert.

    Raises:
        ValueError: for a tokenizer without a template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"format chat needs a chat template, and the tokenizer of {tokenizer.name_or_path} has none; take an "
            "instruct model's tokenizer, or put a chat_template.jinja beside tokenizer.json"
        )
    return sha256_of_json([tokenizer.get_chat_template(), tokenizer.special_tokens_map])


def encode(batch: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokens of documents, which are all texts or all conversations.

    A text is closed by the end-of-text token. A conversation is what the chat template makes of it, nothing added.

    Raises:
        ValueError: if the template refuses a conversation, or does not tell where its answers are.
    """
    texts = [document for document in batch if isinstance(document, str)]
    conversations = [document for document in batch if isinstance(document, Conversation)]
    assert not (texts and conversations), "the order of a mixed batch would be lost"
    if texts:
        return [Encoded([*ids, tokenizer.eos_token_id]) for ids in _token_ids(texts, tokenizer)]
    if GENERATION.search(tokenizer.get_chat_template()):
        return [_marked(conversation, tokenizer) for conversation in conversations]
    return _incremental(conversations, tokenizer)


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A batch at once, which `tokenizers` spreads over the cores unless TOKENIZERS_PARALLELISM forbids it."""
    backend = tokenizer.backend_tokenizer
    # a tokenizer.json may come with limits of the use it was saved from
    backend.no_truncation()
    backend.no_padding()
    # the fast form does not keep where in the text each token was, which costs as much as finding the tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _incremental(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Each conversation up to every answer, and with it: what an answer adds is the answer."""
    chains = [_chain(conversation, tokenizer) for conversation in conversations]
    ids = iter(_token_ids([text for chain in chains for text in chain], tokenizer))
    return [
        with_answers(conversation.place, [next(ids) for _ in chain])
        for conversation, chain in zip(conversations, chains, strict=True)
    ]


def _chain(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    messages, chain = conversation.messages, []
    render: Any = partial(tokenizer.apply_chat_template, tokenize=False)
    with _refusal(conversation):
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                chain.append(render(messages[:index], add_generation_prompt=True))
                chain.append(render(messages[: index + 1]))
    return chain


@contextmanager
def _refusal(conversation: Conversation) -> Iterator[None]:
    try:
        yield
    except (TemplateError, OverflowError) as error:
        # transformers overflows on a mark around nothing
        raise ValueError(f"{conversation.place} is refused by the tokenizer's chat template: {error}") from error


def with_answers(place: str, chain: list[list[int]]) -> Encoded:
    """The last link of a chain, with every other step of it to be predicted.

    Args:
        place: file and line, for errors.
        chain: token ids of a conversation up to its first answer, with it, up to its second answer, with it, ...

    Raises:
        ValueError: if a link does not begin with the one before: then what it adds is no answer.
    """
    predicted = [False] * len(chain[0])
    for step, (earlier, later) in enumerate(pairwise(chain)):
        added = len(later) - len(earlier)
        if later[: len(earlier)] != earlier or (step % 2 == 0 and not added):
            raise ValueError(
                f"{place} does not show where answer {step // 2 + 1} is: the chat template renders what is before "
                f"{'it' if step % 2 == 0 else 'the next turn'} otherwise once more follows; mark answers in the "
                "template with {% generation %}"
            )
        predicted += [step % 2 == 0] * added
    return Encoded(chain[-1], predicted)


def _marked(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """What the template itself marks as the assistant's."""
    render: Any = tokenizer.apply_chat_template
    with _refusal(conversation):
        made = render(conversation.messages, return_dict=True, return_assistant_tokens_mask=True)
    predicted = [bool(value) for value in made["assistant_masks"]]
    stretches = sum(now and not before for before, now in pairwise([False, *predicted]))
    answers = sum(message["role"] == "assistant" for message in conversation.messages)
    # transformers marks all that follows where it cannot map the end of an answer to a token
    if stretches != answers:
        raise ValueError(
            f"{conversation.place} has {answers} answers, but the chat template's {{% generation %}} marks {stretches}"
        )
    return Encoded(list(made["input_ids"]), predicted)
