"""A small Llama that is trained from nothing on the embedded domains: what ladder.py and ablations.py share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from bare_trainer import BARE
from configured_text import embedded, settings_of

from flextron_lit.costs import parameter_table
from flextron_lit.costs.budget import Limit
from flextron_lit.data import ResumableLoader, TextDataModule
from flextron_lit.data.texts import documents
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.extraction import extract
from flextron_lit.losses.by_chunk import Predictions, losses
from flextron_lit.losses.measured_loss import INPUTS, Batch, MeasuredLoss
from flextron_lit.routers.from_budget import Routing
from flextron_lit.sources import load_tokenizer
from flextron_lit.sources.stock import from_config
from flextron_lit.space import SubNetwork
from flextron_lit.stages import Stage

VOCABULARY, END = 1024, "<|endoftext|>"
HIDDEN, LAYERS, HEAD_DIM, HEADS_A_GROUP = 64, 4, 8, 2
NEURONS, GROUPS = 256, 4
"""Of the largest network."""
BLOCK_SIZE = 128
WARM_UP, LAST_RATE, WEIGHT_DECAY, BETAS = 0.05, 0.1, 0.1, (0.9, 0.95)
"""Of training from nothing: shares of the steps and of the learning rate, and AdamW's."""
EMBEDDINGS = 10
"""Times the learning rate of the blocks: at one rate for all, such a network knows little but how frequent tokens are
for hundreds of steps, the longer the wider it is."""

NETWORK = {
    "vocabulary": VOCABULARY,
    "hidden_size": HIDDEN,
    "layers": LAYERS,
    "neurons": NEURONS,
    "groups": GROUPS,
    "heads_a_group": HEADS_A_GROUP,
    "head_dim": HEAD_DIM,
    "block_size": BLOCK_SIZE,
    "embeddings_rate": EMBEDDINGS,
}
"""For the record: what is measured on another network does not belong beside it."""


# --- the text -----------------------------------------------------------------------------------------------------


class OrderedText(TextDataModule):
    """Training blocks in an order that may change, with the same documents held out for all of them."""

    order = 0
    """A seed."""

    def prepare_data(self) -> None:
        # once: every run asks for it
        if not self._tokenized:
            super().prepare_data()

    def train_dataloader(self, **sizes: int | None) -> ResumableLoader:
        loader = super().train_dataloader(**sizes)
        assert isinstance(loader, ResumableLoader)
        loader.sampler.seed = self.order
        return loader


def learned_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of all embedded documents, those held out too: every network reads by the same one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(chain.from_iterable(map(documents, settings_of("embedded")[0].values())), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def small_text(folder: Path, test_tokens: int) -> OrderedText:
    """The embedded domains as tokens of a vocabulary of their own, which is kept in the folder."""
    reader = folder / "tokenizer"
    if not (reader / "config.json").is_file():
        learned_tokenizer().save_pretrained(reader)
        config().save_pretrained(reader)
    found = embedded(str(reader), BLOCK_SIZE, test_tokens=test_tokens)
    found.__class__ = OrderedText
    return found


def endless(text: TextDataModule) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    loader = text.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


# --- the networks -------------------------------------------------------------------------------------------------


def config() -> LlamaConfig:
    """Of the largest network."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=GROUPS * HEADS_A_GROUP,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        # tied, so narrow a network tells no pairs of tokens apart for the first hundreds of steps
        tie_word_embeddings=False,
        max_position_embeddings=BLOCK_SIZE,
        bos_token_id=None,
        eos_token_id=0,
    )


def untrained(seed: int, share: float = 1.0) -> PreTrainedModel:
    """A network with so much of the largest one's neurons and heads, and its first weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        largest = from_config(config())
    if share == 1:
        return largest
    backbone = ElasticBackbone(largest)
    return extract(backbone, backbone.space.uniform(share, share))


def train(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    steps: int,
    learning_rate: float,
    narrowed: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """AdamW on the language loss, in place; what makes a step's network narrower is asked for at each."""
    blocks = [each for name, each in model.named_parameters() if ".layers." in name]
    around = [each for name, each in model.named_parameters() if ".layers." not in name]
    groups = [{"params": blocks}, {"params": around, "lr": EMBEDDINGS * learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(WARM_UP * steps), steps, min_lr_rate=LAST_RATE
    )
    model.train()
    for batch in islice(batches, steps):
        with narrowed():
            predictions = Predictions.of(model, {name: batch[name] for name in INPUTS})
            loss, _ = losses(predictions, batch["labels"], {})
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def save(model: PreTrainedModel, text: TextDataModule, folder: Path) -> None:
    """With its tokenizer, as a checkpoint that stages start from."""
    assert text.tokenizer is not None
    load_tokenizer(text.tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)


def fit(stage: Stage, text: OrderedText, batch_size: int, folder: Path, *callbacks: Callback, **settings: Any) -> None:
    """A stage of this project, by a Trainer that writes what the callbacks write alone."""
    text.batch_size = batch_size
    trainer = Trainer(
        **{**BARE, "precision": "32-true", "enable_model_summary": False, **settings},
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    trainer.fit(stage, datamodule=stage.attach(text))


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnTestDocuments:
    """Losses on the held-out documents of all domains, which nothing was trained, sorted or chosen by."""

    batches: list[Batch]

    @classmethod
    def of(cls, text: TextDataModule) -> OnTestDocuments:
        return cls(list(chain.from_iterable(text.test_dataloader())))

    def __call__(self, backbone: ElasticBackbone, sub_network: SubNetwork | None = None) -> float:
        """In nats per token; of the full network where no other is given."""
        backbone.model.eval()
        return MeasuredLoss(backbone, self.batches)(sub_network or backbone.space.full())


def by_excess(stage: Stage) -> Callable[[Limit], SubNetwork]:
    """How a stage's network answers by the excess losses that its conversion computed."""
    backbone = stage.backbone
    routing = Routing(backbone.space, {"parameters": parameter_table(backbone)}, {}, None, stage.excess)
    return partial(answer, routing)


def answer(routing: Routing, limit: Limit) -> SubNetwork:
    found = routing.answer([limit])
    assert found is not None
    return found.sub_network


def of_blocks(backbone: ElasticBackbone, share: float) -> Limit:
    """So much of what the elastic blocks have of parameters."""
    table = parameter_table(backbone)
    return Limit(table, table.fixed + share * (table.full - table.fixed), f"{share:.0%} of the blocks")
