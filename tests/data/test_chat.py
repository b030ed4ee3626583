import io
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from flextron_lit.data import TextDataModule, TextDomain, datamodule
from flextron_lit.data.document import Conversation
from flextron_lit.data.encoding import encode, with_answers
from flextron_lit.data.formats import documents_in
from flextron_lit.data.packing import block
from flextron_lit.data.streams import SPLITS
from flextron_lit.data.tokenized import split_documents, tokenized
from flextron_lit.losses.cross_entropy import IGNORED, cross_entropy
from tests.conftest import ATTENTION, make_llama
from tests.data.chat import CHATML, CONVERSATIONS, MARKED, chat_domain, tokenizer_with, turns

# each hides in its own way where an answer is
NEVER_A_PREFIX = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}(to answer){% endif %}"
)
FORGETS_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% else %}...{% endif %}{% endfor %}"
)
SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
MARKS_ROBOTS = MARKED.replace("== 'assistant'", "== 'robot'")
MARKS_USERS_TOO = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
MARKS_NOTHING = "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}"
REFUSES = "{{ raise_exception('no system message, please') if messages[0].role == 'system' }}" + CHATML


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))


def pieces(messages):
    """A conversation as CHATML renders it, in pieces: (text, is it an answer)."""
    for message in messages:
        answer = message["role"] == "assistant"
        yield f"<{message['role']}>\n", False
        yield f"{message['content']}<|endoftext|>\n", answer


def by_hand(messages, tokenizer):
    """Ids and labels of a conversation on its own, [1, tokens] each; every character is a token here."""
    ids, labels = [], []
    for text, answer in pieces(messages):
        made = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += made
        labels += made if answer else [IGNORED] * len(made)
    return torch.tensor([ids]), torch.tensor([labels])


# --- reading ----------------------------------------------------------------------------------------------------


def read(content, **settings):
    domain = TextDomain(source="x", format="chat", **settings)
    return list(documents_in("file", io.BytesIO(content), domain))


def test_a_line_is_a_conversation():
    lines = "\n".join(json.dumps({"messages": messages}) for messages in CONVERSATIONS)
    found = read(lines.encode())
    assert [c.messages for c in found] == CONVERSATIONS
    assert [c.place for c in found][:2] == ["file, line 1,", "file, line 2,"]
    assert read(json.dumps({"talk": CONVERSATIONS[0]}).encode(), field="talk")[0].messages == CONVERSATIONS[0]
    # what other tools write where a message has nothing
    with_nulls = [message | {"tool_calls": None} for message in CONVERSATIONS[0]]
    assert read(json.dumps({"messages": with_nulls}).encode())[0].messages == CONVERSATIONS[0]


def row(*messages):
    return {"messages": list(messages)}


USER, ANSWER = turns("q", "a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has no messages in field 'messages'; it has text"),
        ([1], "has no messages in field 'messages'; it has a list"),
        ({}, "has no messages in field 'messages'; it has no field"),
        ({"messages": "x"}, "has no messages in field 'messages'; it has a str there"),
        (row("x"), "message 1, has no text in field 'role'; it has a str"),
        (row(USER, {"content": "a"}), "message 2, has no text in field 'role'; it has content"),
        (row({"role": "user"}), "message 1, has no text in field 'content'; it has role"),
        (row({"role": "user", "content": ["a"]}), "message 1, has no text in field 'content'; it has a list there"),
        (
            row(USER, ANSWER | {"content": None, "tool_calls": ["f"]}),
            "message 2, has no text in field 'content'; it has a N",
        ),
        (row(USER | {"content": "\ud800"}, ANSWER), r"message 1, holds U\+D800, half of a surrogate pair"),
        (row(USER, ANSWER | {"weight": 0}), "message 2, has weight beside role and content, which has no effect"),
        (row(ANSWER), "message 1, is by 'assistant' where 'user' must speak"),
        (row(USER, ANSWER, ANSWER), "message 3, is by 'assistant' where 'user' must speak"),
        (row(USER, USER), "message 2, is by 'user' where 'assistant' must speak"),
        (row(USER, USER | {"role": "system"}), "message 2, is by 'system' where 'assistant' must speak"),
        (row(USER | {"role": "robot"}, ANSWER), "message 1, is by 'robot' where 'user' must speak"),
        (row(USER), "ends without an answer of the assistant"),
        (row(USER, ANSWER, USER), "ends without an answer of the assistant"),
        (row(USER | {"role": "system"}), "ends without an answer of the assistant"),
    ],
)
def test_a_malformed_conversation_is_refused_by_line_and_message(row, message):
    good = json.dumps({"messages": CONVERSATIONS[0]})
    with pytest.raises(ValueError, match=f"^file, line 2, {message}"):
        read(f"{good}\n{json.dumps(row)}\n".encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": [{"role": "user", "cont', "file, line 1, is not JSON"),
        (b'{"messages": "\xff"}', "file, line 1, is not UTF-8 text: byte 14 is 0xff"),
    ],
)
def test_a_cut_off_file_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


# --- where the answers are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_are_predicted_with_what_ends_them(template):
    tokenizer = tokenizer_with(template)
    found = encode([Conversation("here", messages) for messages in CONVERSATIONS], tokenizer)
    for encoded, messages in zip(found, CONVERSATIONS, strict=True):
        ids, labels = by_hand(messages, tokenizer)
        assert encoded.ids == ids[0].tolist()
        assert encoded.predicted == (labels[0] != IGNORED).tolist()
        assert encoded.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    spoken = tokenizer.decode(np.array(found[1].ids)[found[1].predicted])
    assert spoken == "4<|endoftext|>\n6, of course<|endoftext|>\n"


def test_every_other_link_of_a_chain_is_an_answer():
    encoded = with_answers("here", [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])
    assert encoded.ids == [1, 2, 3, 4, 5, 6]
    assert encoded.predicted == [False, False, True, True, False, True]
    # a token across the border, as merges make
    with pytest.raises(ValueError, match="^here does not show where answer 1 is: .* what is before it otherwise"):
        with_answers("here", [[1, 2], [1, 23, 4]])
    with pytest.raises(ValueError, match="where answer 1 is: .* what is before the next turn otherwise"):
        with_answers("here", [[1, 2], [1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 5, 6]])
    with pytest.raises(ValueError, match="where answer 2 is: .* what is before it otherwise"):
        with_answers("here", [[1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5, 6]])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NEVER_A_PREFIX, "chat.jsonl, line 1, does not show where answer 1 is: .*mark answers in the template"),
        (FORGETS_ANSWERS, "chat.jsonl, line 2, does not show where answer 1 is: .* before the next turn otherwise"),
        (SILENT, "chat.jsonl, line 1, does not show where answer 1 is"),
        (MARKS_ROBOTS, r"line 1, has 1 answers, but the chat template's \{% generation %\} marks 0"),
        (MARKS_USERS_TOO, r"line 2, has 2 answers, but the chat template's \{% generation %\} marks 1"),
        (MARKS_NOTHING, "line 1, is refused by the tokenizer's chat template: can't convert negative int"),
        (REFUSES, "chat.jsonl, line 2, is refused by the tokenizer's chat template: no system message, please"),
        (REFUSES + MARKED, "chat.jsonl, line 2, is refused by the tokenizer's chat template: no system message"),
        (None, "format chat needs a chat template, and the tokenizer of .* has none; take an instruct model's"),
    ],
)
def test_a_template_that_does_not_tell_is_refused_by_file_and_line(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        tokenized("talk", chat_domain(tmp_path), tokenizer_with(template), held_out=0.1, seed=0)


# --- streams and loss -------------------------------------------------------------------------------------------


def test_streams_hold_whole_conversations_and_their_masks(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    made = tokenized("talk", chat_domain(tmp_path), tokenizer, held_out=0.1, seed=0)
    for split, indices in split_documents(len(CONVERSATIONS), 0.1, 0).items():
        stream = made.streams[split]
        assert isinstance(stream.predicted, np.memmap)
        expected = [by_hand(CONVERSATIONS[i], tokenizer) for i in indices]
        assert stream.tokens.tolist() == torch.cat([ids for ids, _ in expected], 1)[0].tolist()
        assert stream.predicted.tolist() == (torch.cat([labels for _, labels in expected], 1)[0] != IGNORED).tolist()
        assert stream.starts.tolist() == np.cumsum([0, *(ids.shape[1] for ids, _ in expected)])[:-1].tolist()
        assert 0 < stream.num_predicted < len(stream.tokens)


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_loss_on_packed_conversations_is_that_of_their_answers_alone(tmp_path, attention):
    tokenizer = tokenizer_with(CHATML)
    stream = tokenized("talk", chat_domain(tmp_path), tokenizer, held_out=0.1, seed=0).streams["train"]
    model = make_llama(attention, vocab_size=len(tokenizer), max_position_embeddings=512)
    batch = {key: value[None] for key, value in block(stream, 0, len(stream.tokens)).items()}
    with torch.no_grad():
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        total, tokens = cross_entropy(logits, batch["labels"])
        separate = [by_hand(CONVERSATIONS[i], tokenizer) for i in split_documents(len(CONVERSATIONS), 0.1, 0)["train"]]
        losses = [cross_entropy(model(ids).logits, labels) for ids, labels in separate]
        unmasked = [cross_entropy(model(ids).logits, ids) for ids, _ in separate]
    assert len(separate) == 3
    assert tokens == sum(count for _, count in losses)
    torch.testing.assert_close(total, sum(loss for loss, _ in losses), rtol=1e-5, atol=1e-4)
    assert tokens < sum(count for _, count in unmasked)
    assert (sum(loss for loss, _ in unmasked) - total).abs() > 1


def test_a_block_that_begins_inside_an_answer_does_not_predict_its_first_token(tmp_path):
    stream = tokenized("talk", chat_domain(tmp_path), tokenizer_with(CHATML), held_out=0.1, seed=0).streams["train"]
    index = next(i for i in range(1, len(stream.tokens) // 8) if stream.predicted[8 * i - 1 : 8 * i + 2].all())
    labels = block(stream, index, 8)["labels"]
    assert labels[0] == IGNORED
    assert labels[1] == stream.tokens[8 * index + 1]


def test_the_key_changes_with_whatever_changes_the_tokens(tmp_path):
    def key(template=CHATML, eos=None, **settings):
        tokenizer = tokenizer_with(template)
        if eos:
            tokenizer.eos_token = eos
        return tokenized("talk", chat_domain(tmp_path, **settings), tokenizer, held_out=0.1, seed=0).key

    assert key() == key()
    others = [key(CHATML.replace("\n", " ")), key(eos="!"), key(conversations=CONVERSATIONS[::-1])]
    assert len({key(), *others}) == 4


def chat_module(tmp_path, monkeypatch, conversations=CONVERSATIONS, **settings):
    monkeypatch.setattr(datamodule, "load_tokenizer", lambda _: tokenizer_with(CHATML))
    monkeypatch.setattr(datamodule, "load_config", lambda _: LlamaConfig())
    defaults = {"tokenizer": "x", "block_size": 16, "validation_tokens": 16, "test_tokens": 16}
    data = TextDataModule({"talk": chat_domain(tmp_path, conversations)}, **(defaults | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_datamodule_describes_how_much_is_learnt(tmp_path, monkeypatch):
    data = chat_module(tmp_path, monkeypatch)
    described = data.describe()["domains"]["talk"]
    assert described["format"] == "chat"
    for split in SPLITS:
        assert 0 < described["answer_tokens"][split] < described["tokens"][split]
    labels = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    assert 0 < (labels != IGNORED).sum() < labels.numel() / 2


def test_held_out_blocks_without_an_answer_are_refused(tmp_path, monkeypatch):
    long = [turns("x" * 90, "y") for _ in range(5)]
    data = chat_module(tmp_path, monkeypatch, long)
    with pytest.raises(ValueError, match="the 1 validation blocks of domain talk hold no part of an answer"):
        data.val_dataloader()
    data = chat_module(tmp_path, monkeypatch, long, validation_tokens=112)
    assert len(data.val_dataloader()[0]) == 7
