"""Mistral: as Llama, with one sliding window for all layers or none."""

from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralMLP

from flextron_lit.elastic.families.base import Family
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.families.rotary import RotaryAttention


class ElasticMistralMLP(GatedMLP, MistralMLP):
    """Gated MLP that uses its first neurons only."""


class ElasticMistralAttention(RotaryAttention, MistralAttention):
    """Attention that uses its first KV groups only."""

    @property
    def sliding_window(self) -> int | None:  # type: ignore[override]  # read only
        """That of the config: the stock modules hold none."""
        return self.config.sliding_window


MISTRAL = Family(MistralForCausalLM, {"attention": ElasticMistralAttention, "mlp": ElasticMistralMLP})
