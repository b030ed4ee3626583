"""From what a client asks to tokens, and back: where prompts begin, how long they may be, what ends an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from flextron_lit.data.encoding import refuse_unknown
from flextron_lit.elastic.positions import readable
from flextron_lit.generation.prompt import conversation, encoded
from flextron_lit.model import FlextronModel
from flextron_lit.serving.asked import Asked
from flextron_lit.serving.refusal import RequestError


@dataclass(frozen=True)
class Lengths:
    """How much a request may take."""

    prompt: int
    """Tokens."""
    answer: int
    """Tokens, which is also what a request gets that does not say."""
    readable: int
    """Tokens that the network reads at once, both together."""

    def room(self, prompt: int, wanted: int | None) -> int:
        """Most tokens of an answer.

        Args:
            prompt: tokens of the prompt.
            wanted: as asked for, or None.

        Raises:
            RequestError: if prompt or answer are longer than they may be.
        """
        most = min(self.prompt, self.readable - 1)
        if prompt > most:
            what = f"the prompt has {prompt} tokens, but at most {most} are read here; shorten it"
            raise RequestError(400, what, code="context_length_exceeded", param="messages")
        fitting = min(self.answer, self.readable - prompt)
        if wanted is not None and wanted > fitting:
            what = f"{wanted} tokens are asked for, but behind a prompt of {prompt} at most {fitting} are written here"
            raise RequestError(400, f"{what}; ask for fewer", code="context_length_exceeded", param="max_tokens")
        return fitting if wanted is None else wanted


def lengths(model: FlextronModel, prompt: int | None, answer: int) -> Lengths:
    """The lengths of a network, within what the operator allows; None allows what it reads at once."""
    most = readable(model.config)
    return Lengths(most if prompt is None else prompt, answer, most)


def prompt_tokens(model: FlextronModel, asked: Asked) -> list[int]:
    """The tokens of what a client asks.

    Raises:
        RequestError: if they cannot be made, or the network does not know one of them.
    """
    tokenizer, config = model.tokenizer, model.config
    if asked.chat and tokenizer.chat_template is None:
        raise RequestError(400, "this model has no chat template; ask /v1/completions", code="no_chat_template")
    try:
        if isinstance(asked.prompt, str):
            begins = model.flextron.prompts_begin
            read = encoded(tokenizer, config, asked.prompt, chat=False, special_tokens=begins)
        elif asked.chat:
            read = conversation(tokenizer, config, asked.prompt)  # type: ignore[arg-type]  # messages, where it is chat
        else:
            return _known(model, asked.prompt)  # type: ignore[arg-type]  # else tokens
    except (ValueError, TemplateError) as error:
        raise RequestError(400, str(error)) from error
    tokens: list[int] = read["input_ids"][0].tolist()
    if not tokens:
        raise RequestError(400, "the prompt has no tokens; there is nothing to go on from")
    return tokens


def _known(model: FlextronModel, tokens: Sequence[int]) -> list[int]:
    """Tokens as a client sent them; refused where the network does not know one."""
    if min(tokens) < 0:
        raise ValueError(f"there is no token {min(tokens)}")
    refuse_unknown(list(tokens), model.tokenizer, model.config.vocab_size, "the prompt")
    return list(tokens)


def ends_of(model: FlextronModel) -> tuple[frozenset[int], tuple[str, ...]]:
    """Tokens and texts that end an answer, as the model's own settings say (`generation_config.json`)."""
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = [own.stop_strings] if isinstance(own.stop_strings, str) else own.stop_strings or ()
    return frozenset(end for end in ends if end is not None), tuple(stops)


def text_of(model: FlextronModel, tokens: Sequence[int]) -> str:
    """What tokens say, without special ones; a longer answer begins with the text of a shorter one."""
    return str(model.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
