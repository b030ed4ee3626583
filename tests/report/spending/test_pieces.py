import pytest

from flextron_lit.report.spending.token_pieces import pieces_of
from tests.report.spending.texts import HARD, byte_tokenizer, spaced_tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [HARD, "", "a", "\n", "🦉", "naïve e\u0301"])
def test_pieces_are_the_text(text):
    tokenizer = byte_tokenizer()
    ids = ids_of(tokenizer, text)
    pieces = pieces_of(ids, tokenizer)
    assert "".join(piece.text for piece in pieces) == text
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(len(ids)))


def test_a_character_is_not_cut_although_its_tokens_are():
    tokenizer = byte_tokenizer()
    pieces = pieces_of(ids_of(tokenizer, "a世🦉b"), tokenizer)
    assert [(p.text, p.stop - p.start) for p in pieces] == [("a", 1), ("世", 3), ("🦉", 4), ("b", 1)]
    # negative control: token by token it would be
    assert "\ufffd" in "".join(tokenizer.decode([i]) for i in ids_of(tokenizer, "世"))


def test_spaces_stay_where_a_tokenizer_drops_the_first():
    tokenizer = spaced_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("▁a", "▁cat", "s", "▁", "▁sat", ".", "▁", "<0xE4>", "<0xB8>")]
    ids += [tokenizer.convert_tokens_to_ids("<0x96>"), tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("▁cat")]
    pieces = pieces_of(ids, tokenizer)
    assert [p.text for p in pieces] == ["a", " cat", "s", " ", " sat", ".", " ", "世", "</s>", " cat"]
    assert "".join(p.text for p in pieces) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    # negative control: on its own a word has no space
    assert tokenizer.decode([ids[1]]) == "cat"


def test_half_a_character_ends_at_a_special_token_or_with_the_text():
    tokenizer = byte_tokenizer()
    world = ids_of(tokenizer, "世")
    pieces = pieces_of([*world[:2], tokenizer.eos_token_id, world[0]], tokenizer)
    assert [(p.text, p.start, p.stop, p.special) for p in pieces] == [
        ("\ufffd", 0, 2, False),
        ("<|endoftext|>", 2, 3, True),
        ("\ufffd", 3, 4, False),
    ]
    assert [p.cut for p in pieces] == [True, False, False]
