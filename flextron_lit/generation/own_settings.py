"""What a model's files say of generating (`generation_config.json`): for a command, what ends a text alone holds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from flextron_lit.model import FlextronModel

ENDS = {"eos_token_id", "stop_strings"}
BESIDE = {"pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config"}
"""What says nothing of how one prompt without padding is gone on from."""


@contextmanager
def ends_alone(model: FlextronModel) -> Iterator[dict[str, Any]]:
    """Keep from Hugging Face's `generate` all but what ends a text; it is to be told what this gives."""
    own = model.generation_config
    stops = [StopStringCriteria(model.tokenizer, own.stop_strings)] if own.stop_strings else []
    # what a call does not set comes from here, whatever it is given
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield {"stopping_criteria": StoppingCriteriaList(stops)}
    finally:
        model.generation_config = own


def unused(model: FlextronModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's files would have changed, and does not, by name.

    Args:
        model: the network.
        settings: of Hugging Face's `generate`, as asked for.
    """
    holds = GenerationConfig._get_default_generation_params() | {k: v for k, v in settings.items() if v is not None}
    said = model.generation_config.to_diff_dict()
    return {
        name: value for name, value in said.items() if name not in ENDS | BESIDE and value != holds.get(name, False)
    }
