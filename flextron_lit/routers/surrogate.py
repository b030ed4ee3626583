"""Surrogates: predict language losses from choices, so that a router learns without running the network."""

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flextron_lit.space import ElasticSpace

Target = Literal["log_excess", "loss"]
TARGETS: tuple[Target, ...] = get_args(Target)
OFFSET = 1.0
"""Nats added before the logarithm. Without it the noise of sub-networks near the full one would be most of the target:
rank correlation 0.963 against 0.983 of the ridge fit on 200 pairs (docs/experiments.md)."""
FOLDS = 8
PENALTIES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def encode(target: Target, losses: Tensor, full: float) -> Tensor:
    """What is predicted, from losses on the same tokens.

    Args:
        target: `log_excess`, the logarithm of what a sub-network loses against the full one (ours: takes the difficulty
            of the text out, and lets a small sub-network's nats not outweigh a large one's), or `loss` itself (paper).
        losses: nats per token, any shape.
        full: the full network's loss.
    """
    return losses.clone() if target == "loss" else ((losses - full).clamp(min=0) + OFFSET).log()


def decode(target: Target, predicted: Tensor, full: float) -> Tensor:
    """Inverse of `encode`: losses in nats per token; by definition none is below the full network's."""
    return predicted if target == "loss" else full + (predicted.exp() - OFFSET).clamp(min=0)


class Surrogate(nn.Module):
    """Predicts a sub-network's language loss from its choices alone (paper, surrogate model).

    Linear main effects of every choice plus the residual of a small MLP (ours; the paper has an MLP alone).

    Sums of single effects explain most of a loss, and a few hundred pairs determine them; the MLP adds what blocks do
    together. `start` gives the main effects the closed-form ridge solution, so training starts from that baseline.

    Args:
        space: the choices.
        hidden: width of the MLP's two hidden layers.
        generator: source of the first weights.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, space: ElasticSpace, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        inputs = len(space) * space.num_choices
        self.main = nn.Linear(inputs, 1)
        self.residual = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        self.register_buffer("centre", torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(1.0))
        layers = [layer for layer in self.residual if isinstance(layer, nn.Linear)]
        _initialise(layers, generator)
        # nothing but main effects at first: training starts from the ridge solution that `start` gives them
        _zero(layers[-1], self.main)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Choice probabilities [..., 2L, N] to the predicted target [...]."""
        inputs = probabilities.float().flatten(-2)
        # bf16 autocast, meant for the backbone, would round predictions to half a percent
        with torch.autocast(inputs.device.type, enabled=False):
            return self.centre + self.scale * (self.main(inputs) + self.residual(inputs)).squeeze(-1)

    @torch.no_grad()
    def after_changes(self, choices: Tensor) -> Tensor:
        """Predictions for every change of a single block, [R, 2L] to [R, 2L, N].

        What a change does to the first layer is a difference of two of its columns, so the widest product, over all
        inputs, is done once a row and not once a change.
        """
        blocks, num_choices = choices.shape[1], self.main.in_features // choices.shape[1]
        inputs = nn.functional.one_hot(choices, num_choices).float().flatten(-2)

        def changed(layer: nn.Linear) -> Tensor:
            columns = layer.weight.T.unflatten(0, (blocks, num_choices))  # [2L, N, out]
            now = columns[torch.arange(blocks), choices]  # [R, 2L, out]
            return layer(inputs)[:, None, None] + columns - now[:, :, None]

        first, *rest = self.residual
        assert isinstance(first, nn.Linear)
        hidden = changed(first)
        for layer in rest:
            hidden = layer(hidden)
        return self.centre + self.scale * (changed(self.main) + hidden).squeeze(-1)

    def error(self, one_hot: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error in units of the targets' variance: what training minimises."""
        return ((self(one_hot) - targets) / self.scale).square().mean()

    @torch.no_grad()
    def start(self, one_hot: Tensor, targets: Tensor, prior: Tensor | None = None) -> None:
        """Take the scale of the targets, and the ridge solution for the main effects.

        Args:
            one_hot: [n, 2L, N].
            targets: [n].
            prior: what main effects are expected to be but for a factor, [2L, N]; they stay unless the pairs clearly
                say otherwise (ours: few pairs then suffice).
        """
        self.centre.copy_(targets.mean())
        self.scale.copy_(targets.std().clamp(min=1e-6))
        inputs, scaled = one_hot.flatten(-2), (targets - self.centre) / self.scale
        expected = torch.zeros(inputs.shape[-1], device=inputs.device) if prior is None else prior.flatten().float()
        said = inputs @ expected
        apart = said - said.mean()
        factor = (apart @ scaled) / apart.square().sum().clamp(min=1e-12)
        solve = ridge if prior is None else cautious
        weight, bias = solve(inputs, scaled - factor * apart)
        self.main.weight.copy_((weight + factor * expected)[None])
        self.main.bias.copy_(bias - factor * said.mean())


class TokenSurrogate(nn.Module):
    """The surrogate of a dynamic router: a token's excess loss from its own choices and its hidden state (ours).

    Main effects of every choice, their products with what the hidden state says, and the residual of a small MLP. The
    paper's surrogate sees a sequence's mean choices, so every token gets the same gradient, and a router that learns
    from it cannot tell tokens apart.

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
        _initialise((self.directions, self.of_choices, self.of_state), generator)
        _zero(self.main, self.effects, self.residual)

    def forward(self, probabilities: Tensor, states: Tensor) -> Tensor:
        """Choices [..., 2L, N] and the full network's last hidden states [..., D] to excess losses [...] in nats."""
        choices, state = probabilities.float().flatten(-2), self.norm(states.float())
        with torch.autocast(choices.device.type, enabled=False):
            mixed = (self.directions(state) * self.effects(choices)).sum(-1)
            hidden = nn.functional.silu(self.of_choices(choices) + self.of_state(state))
            return self.scale * (self.main(choices) + self.residual(hidden)).squeeze(-1) + self.scale * mixed


def ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Linear least squares with an L2 penalty chosen by generalised cross-validation (Golub, Heath, Wahba 1979).

    The additive baseline that a surrogate must beat.

    Args:
        inputs: [n, features].
        targets: [n].

    Returns:
        Weights [features] and bias, in the targets' dtype.
    """
    x, y = inputs.double(), targets.double()
    x_mean, y_mean = x.mean(0), y.mean()
    u, s, vh = torch.linalg.svd(x - x_mean, full_matrices=False)
    projected = u.T @ (y - y_mean)

    def score(penalty: float) -> float:
        shrink = s.square() / (s.square() + penalty)
        residual = (y - y_mean) - u @ (shrink * projected)
        # the mean costs one degree of freedom too
        return float(residual.square().mean() / (1 - (shrink.sum() + 1) / len(y)).clamp(min=1e-3).square())

    weights = vh.T @ (s / (s.square() + min(PENALTIES, key=score)) * projected)
    return weights.to(targets.dtype), (y_mean - x_mean @ weights).to(targets.dtype)


def cautious(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `ridge`, with the largest penalty whose error in cross-validation is within a standard error of the least.

    The largest of all leaves nothing but a constant (one-standard-error rule, Breiman et al. 1984). A search for what
    is predicted to be best finds the weights that are too small by chance, so that weights which are no more than
    chance do harm (ours).
    """
    x, y = inputs.double(), targets.double()
    fold = torch.arange(len(y), device=y.device) % FOLDS
    errors: dict[float, Tensor] = {}
    for penalty in (*PENALTIES, math.inf):
        each = [_left_out(x, y, fold == k, penalty) for k in range(min(FOLDS, len(y)))]
        errors[penalty] = torch.cat(each)
    best = min(errors.values(), key=lambda found: float(found.mean()))
    bound = best.mean() + best.std() / len(y) ** 0.5
    weights = _solution(x - x.mean(0), y - y.mean(), max(p for p, found in errors.items() if found.mean() <= bound))
    return weights.to(targets.dtype), (y.mean() - x.mean(0) @ weights).to(targets.dtype)


def _left_out(x: Tensor, y: Tensor, out: Tensor, penalty: float) -> Tensor:
    """Squared errors on some pairs of what the others say."""
    mean_x, mean_y = x[~out].mean(0), y[~out].mean()
    weights = _solution(x[~out] - mean_x, y[~out] - mean_y, penalty)
    return (y[out] - mean_y - (x[out] - mean_x) @ weights).square()


def _solution(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    if penalty == math.inf:
        return x.new_zeros(x.shape[1])
    # as many equations as pairs, which are fewer than choices
    return x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype, device=x.device), y)


def _initialise(layers: Iterable[nn.Linear], generator: torch.Generator) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


def _zero(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
