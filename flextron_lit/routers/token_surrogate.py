"""The surrogate of a dynamic router: predicts a token's excess loss from its own choices and its hidden state (ours).

The paper's surrogate sees a sequence's mean choices, so every token gets the same gradient, and a router that learns
from it cannot tell tokens apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flextron_lit.space import ElasticSpace


class TokenSurrogate(nn.Module):
    """Main effects of every choice, their products with what the hidden state says, and the residual of a small MLP.

    Args:
        space: the choices.
        hidden_size: D.
        rank: directions of the hidden state that change what a choice costs.
        hidden: width of the MLP.
        generator: source of the first weights.
    """

    scale: Tensor
    """Standard deviation of the targets."""

    def __init__(
        self, space: ElasticSpace, hidden_size: int, rank: int, hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        inputs = len(space) * space.num_choices
        self.main = nn.Linear(inputs, 1)
        self.directions = nn.Linear(hidden_size, rank)
        self.effects = nn.Linear(inputs, rank)
        self.of_choices = nn.Linear(inputs, hidden)
        self.of_state = nn.Linear(hidden_size, hidden)
        self.residual = nn.Linear(hidden, 1)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.register_buffer("scale", torch.tensor(1.0))
        for layer in (self.directions, self.of_choices, self.of_state):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        for layer in (self.main, self.effects, self.residual):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, probabilities: Tensor, states: Tensor) -> Tensor:
        """Choices [..., 2L, N] and the full network's last hidden states [..., D] to excess losses [...] in nats."""
        choices, state = probabilities.float().flatten(-2), self.norm(states.float())
        with torch.autocast(choices.device.type, enabled=False):
            mixed = (self.directions(state) * self.effects(choices)).sum(-1)
            hidden = nn.functional.silu(self.of_choices(choices) + self.of_state(state))
            return self.scale * (self.main(choices) + self.residual(hidden)).squeeze(-1) + self.scale * mixed
