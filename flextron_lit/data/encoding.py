"""Documents to token ids, and which of a conversation's tokens are its answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class Ends:
    """What a tokenizer puts around a text by itself; nothing, where it is not to be asked."""

    prefix: tuple[int, ...] = ()
    """A BOS, say."""
    suffix: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Ends:
        """As the tokenizer has them.

        Raises:
            ValueError: for a tokenizer that changes what is between them.
        """
        call: Any = tokenizer
        read = partial(call, verbose=False)
        words = (*"a.", *tokenizer.get_vocab())
        word, bare = next((w, ids) for w in words if (ids := read(w, add_special_tokens=False)["input_ids"]))
        full = read(word)["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        if start is None:
            raise ValueError(
                f"{type(tokenizer).__name__} reads {word!r} as {bare}, but as {full} with its special tokens; set "
                "data.init_args.special_tokens to false"
            )
        return cls(tuple(full[:start]), tuple(full[start + len(bare) :]))

    def begun(self, ids: Sequence[int]) -> list[int]:
        """Tokens of a text behind the prefix, unless they begin with it."""
        return [*ids] if tuple(ids[: len(self.prefix)]) == self.prefix else [*self.prefix, *ids]

    def around(self, ids: Sequence[int], close: int | None) -> list[int]:
        """Tokens of a document as it stands in a stream.

        Args:
            ids: of its text.
            close: the end-of-text token, which closes it; None leaves it open unless the tokenizer closes it.
        """
        closing = [] if close is None else [close]
        # what is read as the tokenizer reads it without all this stays exactly that
        if not (self.prefix or self.suffix):
            return [*ids, *closing]
        begun = self.begun(ids)
        if tuple(begun[len(begun) - len(self.suffix) :]) != self.suffix:
            begun += self.suffix
        return begun if begun[-1:] == closing else [*begun, *closing]


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


def refuse_unreadable(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> bool:
    """Refuse a tokenizer whose texts a network cannot read.

    Args:
        tokenizer: reads texts for it.
        vocab_size: tokens that the network knows, ids 0 and on.

    Returns:
        Whether there may be tokens that it does not know all the same: added ones, such as one for padding, which only
        a text has that spells them.

    Raises:
        ValueError: naming a token of every text's vocabulary, or one around texts, that it does not know.
    """
    known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False) if tokenizer.is_fast else {}
    around = {tokenizer.eos_token: tokenizer.eos_token_id, tokenizer.bos_token: tokenizer.bos_token_id}
    beyond = {token: index for token, index in (known | around).items() if index is not None and index >= vocab_size}
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise ValueError(f"the tokenizer has {unknown(beyond[token], token, vocab_size)}")
    return max(tokenizer.get_vocab().values()) >= vocab_size


def refuse_unknown(
    ids: Sequence[int] | np.ndarray, tokenizer: PreTrainedTokenizerBase, vocab_size: int, text: str
) -> None:
    """Refuse a text with a token that a network does not know.

    Args:
        ids: its tokens.
        tokenizer: made them.
        vocab_size: tokens that the network knows, ids 0 and on.
        text: what to call it.

    Raises:
        ValueError: naming the token.
    """
    most = int(np.max(ids)) if len(ids) else 0
    if most >= vocab_size:
        raise ValueError(f"{text} holds {unknown(most, str(tokenizer.convert_ids_to_tokens(most)), vocab_size)}")


def unknown(index: int, token: str, vocab_size: int) -> str:
    """What there is to say of a token that a network does not know."""
    return f"{token!r}, token {index}, but the network knows {vocab_size}; take the tokenizer that it was trained with"


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


def encode(batch: Sequence[Document], tokenizer: PreTrainedTokenizerBase, ends: Ends = Ends()) -> list[Encoded]:
    """Tokens of documents, which are all texts or all conversations.

    A text is closed by the end-of-text token; where it spells a special token, it is read as that. A conversation is
    what the chat template makes of it, nothing added.

    Args:
        batch: the documents.
        tokenizer: reads them.
        ends: what stands around a text, beside what closes it.

    Raises:
        ValueError: if the template refuses a conversation, or does not tell where its answers are.
    """
    texts = [document for document in batch if isinstance(document, str)]
    conversations = [document for document in batch if isinstance(document, Conversation)]
    assert not (texts and conversations), "the order of a mixed batch would be lost"
    if texts:
        return [Encoded(ends.around(ids, tokenizer.eos_token_id)) for ids in _token_ids(texts, tokenizer)]
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
