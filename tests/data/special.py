"""A tokenizer that puts special tokens around a text, for tests: every byte is a token, 257 begins, 256 ends."""

from tokenizers import processors

from tests.data.chat import tokenizer_with

END, BEGIN = 256, 257


def with_bos(*, ends=False, template=None):
    tokenizer = tokenizer_with(template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokens = [("<s>", BEGIN), ("<|endoftext|>", END)]
    around = processors.TemplateProcessing(single=f"<s> $A{' <|endoftext|>' * ends}", special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), around])
    return tokenizer


def write_dense(folder, *, ends=False):
    """A dense tiny Llama with that tokenizer."""
    from tests.conftest import make_llama

    make_llama(vocab_size=258, eos_token_id=END, bos_token_id=BEGIN).save_pretrained(folder)
    with_bos(ends=ends).save_pretrained(folder)
    return folder
