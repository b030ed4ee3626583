"""Conversations, and a tokenizer with a chat template, for tests."""

import json

from flextron_lit.data import TextDomain
from flextron_lit.sources import load_tokenizer
from tests.front_door import ROOT

CHATML = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}\n{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def tokenizer_with(template):
    tokenizer = load_tokenizer(f"random:{ROOT / 'configs/models/tiny-llama'}")
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents, system=None):
    """Messages of user and assistant in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    turns("Hi", "Hello."),
    turns("2+2?", "4", "and 3+3?", "6, of course", system="Be brief."),
    turns("Who?", "Me.", system=""),
    turns("", "You said nothing."),
    turns("Why so long?", "Because of this."),
]


def chat_domain(folder, conversations=CONVERSATIONS, **settings):
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages, "id": 1}) + "\n" for messages in conversations))
    return TextDomain(source=str(path), format="chat", **settings)
