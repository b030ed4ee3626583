"""SmolLM3: as Llama, but some layers know no positions; layers may have sliding windows."""

from torch import Tensor
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3ForCausalLM, SmolLM3MLP

from flextron_lit.elastic.families.base import Family
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.families.rotary import RotaryAttention


class ElasticSmolLM3MLP(GatedMLP, SmolLM3MLP):
    """Gated MLP that uses its first neurons only."""


class ElasticSmolLM3Attention(RotaryAttention, SmolLM3Attention):
    """Attention that uses its first KV groups only."""

    def _placed(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super()._placed(query, key, position_embeddings) if self.use_rope else (query, key)


SMOLLM3 = Family(SmolLM3ForCausalLM, {"attention": ElasticSmolLM3Attention, "mlp": ElasticSmolLM3MLP})
