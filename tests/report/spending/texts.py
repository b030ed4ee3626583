"""What tests of coloured text share: tokenizers, made texts, what a page says."""

from html.parser import HTMLParser

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flextron_lit.report.spending.routed_text import RoutedText
from flextron_lit.report.spending.token_classes import token_classes
from flextron_lit.report.spending.token_pieces import pieces_of
from flextron_lit.sources import load_tokenizer
from tests.stages.training import TINY

HARD = 'Ada\'s <b>3 owls</b> & "mills"\r\n\n\tкот 世界 🦉!'
"""Markup, quotes, line ends, tabs, and characters of two, three and four bytes."""


def byte_tokenizer():
    """Every byte is a token, so that a character may be four."""
    return load_tokenizer(TINY)


def spaced_tokenizer():
    """As SentencePiece does it: a mark for a space, bytes for what has no token, no space in front of a text."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁cat", "s", "▁sat", "."]
    bpe = models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def routed_text(text, cost=None, loss=None, begins=()):
    """A text of byte tokens with costs that rise, unless they are given."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(ids, tokenizer)
    count = len(ids)
    cost = torch.linspace(0.4, 0.9, count) if cost is None else torch.tensor(cost)
    loss = torch.arange(count).float() if loss is None else torch.tensor(loss)
    begin = torch.zeros(count, dtype=torch.bool)
    begin[[0, *begins]] = True
    return RoutedText(pieces, token_classes(pieces), begin, cost, cost / 2, cost / 4, loss, loss + 1)


def whole(routed):
    """All of a routed text."""
    return "".join(piece.text for piece in routed.pieces)


class Page(HTMLParser):
    """The stretches of text of a page, the spans in them, the cells of its table, and anything from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.stretches, self.spans, self.cells, self.tags, self.addresses = [], [], [], set(), []
        self._inside = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if attributes.get("class") == "text":
            self.stretches.append("")
            self._inside = "text"
        if tag == "td":
            self.cells.append("")
            self._inside = "td"
        if tag == "span" and self._inside == "text":
            self.spans.append({"classes": attributes["class"].split(), "title": attributes["title"], "text": ""})

    def handle_endtag(self, tag):
        if tag in ("div", "td"):
            self._inside = None

    def handle_data(self, data):
        if self._inside == "text":
            self.stretches[-1] += data
            self.spans[-1]["text"] += data
        if self._inside == "td":
            self.cells[-1] += data
