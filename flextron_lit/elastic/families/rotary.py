"""What Llama and the families after it share: separate projections, rotary positions, GQA, the names."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from flextron_lit.elastic.families.attention import ElasticAttention, Width
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import first_rows, spread_rows


class RotaryAttention(ElasticAttention):
    """Grouped-query or multi-head attention with rotary positions, as in Llama."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    num_key_value_groups: int
    path = "self_attn"
    inner = ("q_proj", "k_proj", "v_proj")
    outer = "o_proj"
    eager = staticmethod(eager_attention_forward)
    rotate = staticmethod(apply_rotary_pos_emb)

    @staticmethod
    def full_width(config: PreTrainedConfig) -> int:
        """Its KV groups."""
        return int(config.num_key_value_heads)

    @property
    def query_rows(self) -> int:
        """Rows of the queries of one KV group, which has several heads (stock: "groups" are the heads of one)."""
        return self.num_key_value_groups * self.head_dim

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(width, TokenGroups):
            query = spread_rows(self.q_proj, hidden_states, width, self.query_rows)
            return query, self.k_proj(hidden_states), self.v_proj(hidden_states)
        query = first_rows(self.q_proj, hidden_states, width * self.query_rows)
        key, value = (first_rows(each, hidden_states, width * self.head_dim) for each in (self.k_proj, self.v_proj))
        return query, key, value
