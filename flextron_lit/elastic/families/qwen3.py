"""Qwen3: as Llama, with a norm on every query and key head, the same for all heads; layers may have sliding windows."""

from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP

from flextron_lit.elastic.families.base import Family
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.families.rotary import RotaryAttention


class ElasticQwen3MLP(GatedMLP, Qwen3MLP):
    """Gated MLP that uses its first neurons only."""


class ElasticQwen3Attention(RotaryAttention, Qwen3Attention):
    """Attention that uses its first KV groups only."""

    shared = frozenset({"q_norm.weight", "k_norm.weight"})

    def _placed(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super()._placed(self.q_norm(query), self.k_norm(key), position_embeddings)


QWEN3 = Family(Qwen3ForCausalLM, {"attention": ElasticQwen3Attention, "mlp": ElasticQwen3MLP})
