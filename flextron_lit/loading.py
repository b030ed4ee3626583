"""An elastic network in memory: from a checkpoint or a dense model, or with random weights where only time matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from flextron_lit import checkpoint
from flextron_lit.checkpoint import FlextronCheckpoint
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.sources import load_dense, load_tokenizer, resolve_model
from flextron_lit.space import ElasticSpace, SpaceConfig


@dataclass(frozen=True)
class Loaded:
    """What a source holds."""

    backbone: ElasticBackbone
    tokenizer: PreTrainedTokenizerBase
    record: FlextronCheckpoint | None
    """What a Flextron checkpoint says beside its weights; None for a dense model."""


def load_elastic(
    source: str,
    space: SpaceConfig | None = None,
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load weights and tokenizer, and make the model elastic.

    Args:
        source: a Flextron checkpoint, or a dense model in any notation.
        space: width choices; None means those of the checkpoint, or the defaults for a dense model.
        attn_implementation: `sdpa` or `eager`.
        dtype: of the weights in memory.
        device: where to put them.

    Raises:
        ValueError: if the source does not exist, is damaged, or cannot become elastic.
    """
    folder = resolve_model(source)
    record = None
    if checkpoint.is_flextron(folder):
        checkpoint.verify(folder)
        record = checkpoint.read(folder)
    model = load_dense(source, attn_implementation=attn_implementation, dtype=dtype)
    torch.nn.Module.to(model, device)
    return Loaded(ElasticBackbone(model, space or (record.space if record else None)), load_tokenizer(source), record)


def blank_elastic(
    config: PreTrainedConfig, space: ElasticSpace, *, dtype: torch.dtype, device: torch.device | str
) -> ElasticBackbone:
    """A network of the same shape with random weights: as fast, without a checkpoint's to read or to disturb."""
    # measuring in the middle of a run must not change what the run draws next
    with torch.random.fork_rng(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)
    return ElasticBackbone(model.eval(), space)
