"""The dynamic router: from a token's hidden state and a budget to its width, block by block (paper)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flextron_lit.costs.table import CostTable
from flextron_lit.elastic.selection import CountingPolicy, Policy
from flextron_lit.routers.noise import gumbel_noise, straight_through
from flextron_lit.space import ElasticSpace, SubNetwork

CONFIDENCE = 3.0
"""Logit of the static router's choices at the start, against 0 of the others."""


class DynamicRouter(nn.Module):
    """One small router a block: a linear map of the token's hidden state, plus a bias that follows the budget.

    What tells an easy token from a hard one is taken to be the same at every budget (ours): so a budget shifts
    thresholds, and the map learns from all budgets. The bias is kept at K budgets and interpolated between them. At
    inference map, standardisation and bias are one product of [N, D].

    Args:
        space: the choices.
        hidden_size: D.
        budgets: cost ratios [K] at which biases are kept, ascending.
    """

    budgets: Tensor
    centre: Tensor
    """Mean of each block's input, [2L, D]."""
    scale: Tensor
    """Its standard deviation, [2L, D]."""
    exists: Tensor

    def __init__(self, space: ElasticSpace, hidden_size: int, budgets: Tensor) -> None:
        super().__init__()
        shape = len(space), space.num_choices
        self.weight = nn.Parameter(torch.zeros(*shape, hidden_size))
        self.bias = nn.Parameter(torch.zeros(len(budgets), *shape))
        self.register_buffer("budgets", budgets.clone())
        self.register_buffer("centre", torch.zeros(shape[0], hidden_size))
        self.register_buffer("scale", torch.ones(shape[0], hidden_size))
        self.register_buffer("exists", space.exists)

    @torch.no_grad()
    def start(self, sub_networks: Sequence[SubNetwork], space: ElasticSpace, mean: Tensor, std: Tensor) -> None:
        """Take a static router's answers, one for each of `budgets`, and the scale of what the blocks read.

        Args:
            sub_networks: K of them.
            space: the choices.
            mean: of each block's input, [2L, D].
            std: [2L, D].
        """
        self.bias.copy_(CONFIDENCE * torch.stack([space.one_hot(each) for each in sub_networks]))
        self.centre.copy_(mean)
        # an input that hardly varies would be blown up
        self.scale.copy_(std.clamp(min=0.1 * float(std.mean())))

    def biases(self, budgets: Tensor) -> Tensor:
        """Interpolated between the two nearest budgets that biases are kept at: [B] to [B, 2L, N]."""
        upper = torch.searchsorted(self.budgets, budgets.contiguous()).clamp(1, len(self.budgets) - 1)
        low, high = self.budgets[upper - 1], self.budgets[upper]
        share = ((budgets - low) / (high - low)).clamp(0, 1)[:, None, None]
        return (1 - share) * self.bias[upper - 1] + share * self.bias[upper]

    def logits(self, block: int, hidden_states: Tensor, budgets: Tensor) -> Tensor:
        """Of a block's choices for every token: [B, T, D] and budgets [B] to [B, T, N]; -inf where none is.

        No gradient flows into the hidden states.
        """
        inputs = hidden_states.detach().float()
        with torch.autocast(inputs.device.type, enabled=False):
            logits = F.linear((inputs - self.centre[block]) / self.scale[block], self.weight[block])
            logits = logits + self.biases(budgets.to(logits))[:, block, None]
        return logits.masked_fill(~self.exists[block], -torch.inf)

    def folded(self, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """The same as one product a block: weights [2L, N, D] and biases [B, 2L, N]."""
        weight = self.weight.detach() / self.scale[:, None]
        shift = (weight * self.centre[:, None]).sum(-1)
        bias = self.biases(budgets.to(self.bias)).detach() - shift
        return weight, bias.masked_fill(~self.exists, -torch.inf)


class InputScale(Policy):
    """A policy that runs the full network and keeps the moments of every block's input.

    Args:
        space: the choices.
    """

    def __init__(self, space: ElasticSpace) -> None:
        self.full = space.full()
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """The full width for every token, [B, T]."""
        flat = hidden_states.float().flatten(0, -2)
        self.moments[block] = flat.mean(0), flat.std(0)
        return torch.full(hidden_states.shape[:-1], self.full.choices[block], device=hidden_states.device)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of every feature of each block's input, [2L, D] each."""
        means, stds = zip(*(self.moments[block] for block in sorted(self.moments)), strict=True)
        return torch.stack(means), torch.stack(stds)


class RoutedPass(Policy):
    """The policy of one training pass: random hard choices for every token, and what they were.

    Noise is drawn once a block, so that recomputed activations meet the same choices.

    Args:
        router: whose choices.
        budgets: cost ratios, one a sequence: [B].
        generator: source of the noise.
        temperature: of the Gumbel-softmax.
        rank: of this process.
        ranks: how many there are, each with other sequences of one batch; the noise is that of the whole batch.
    """

    def __init__(
        self,
        router: DynamicRouter,
        budgets: Tensor,
        generator: torch.Generator,
        temperature: float,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.router = router
        self.budgets = budgets.to(router.bias.device)
        self.generator = generator
        self.temperature = temperature
        self._logits: dict[int, Tensor] = {}
        self._noise: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}

    def begin(self, real: Tensor | None) -> None:
        """A pass begins.

        Raises:
            ValueError: if there is padding, which training text has none of.
        """
        if real is not None:
            raise ValueError("routers are trained on packed text, but this batch holds padding")

    def probabilities(self, block: int, hidden_states: Tensor) -> Tensor:
        """One-hot choices with the gradients of the soft ones, [B, T, N]."""
        logits = self.router.logits(block, hidden_states, self.budgets)
        if block not in self._noise:
            noise = gumbel_noise((len(logits) * self.ranks, *logits.shape[1:]), self.generator)
            self._noise[block] = noise[self.rank :: self.ranks].to(logits.device)
        chosen = straight_through(logits, self._noise[block], self.temperature)
        # a recomputation belongs to another graph: what was chosen first is what losses and costs are of
        self._logits.setdefault(block, logits)
        self._chosen.setdefault(block, chosen)
        return chosen

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """Choice index of every token, [B, T]."""
        # the backbone may run without gradients; the router needs them
        with torch.enable_grad():
            return self.probabilities(block, hidden_states).argmax(-1)

    @property
    def chosen(self) -> Tensor:
        """All choices of the pass, [B, T, 2L, N]."""
        return _stacked(self._chosen)

    @property
    def logits(self) -> Tensor:
        """What they were drawn from, [B, T, 2L, N]."""
        return _stacked(self._logits)

    def ratios(self, table: CostTable) -> Tensor:
        """Mean cost over the tokens of each sequence as a ratio of the full network's, [B], with gradients."""
        return (table.expected(self.chosen.mean(1)) / table.full).to(self.budgets.dtype)


class DynamicPolicy(CountingPolicy):
    """The policy of a deployed dynamic router: arg-max of logits minus price times cost, and a tally of the choices.

    Args:
        router: the trained router.
        table: the cost that it was trained for.
        budgets: cost ratios: one for all sequences, or one for each (with beams: for each group of beams) of a batch.
        prices: in logits per hundredth of the full network's cost, one a budget.
        device: where the network runs.
        dtype: of the block inputs.
    """

    def __init__(
        self,
        router: DynamicRouter,
        table: CostTable,
        budgets: Sequence[float],
        prices: Sequence[float],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weight, bias = router.folded(torch.tensor(budgets))
        costs = 100 * table.padded.to(bias) / table.full
        bias = bias - torch.tensor(prices).to(bias)[:, None, None] * costs
        counts = router.exists.sum(-1).tolist()
        # blocks as lists: an index into a tensor a block costs as much as the product
        self.weights = [w[:n].to(device, dtype) for w, n in zip(weight, counts, strict=True)]
        self.biases = [b[:, :n].to(device, dtype) for b, n in zip(bias.unbind(1), counts, strict=True)]
        self.table = table
        self.tally = [[0] * n for n in counts]

    def __eq__(self, other: object) -> bool:
        """Whether it chooses alike, so that it can go on where the other stopped."""
        if not isinstance(other, DynamicPolicy):
            return NotImplemented
        pairs = zip([*self.weights, *self.biases], [*other.weights, *other.biases], strict=True)
        return all(map(torch.equal, *zip(*pairs, strict=True)))

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """Choice index of every token, [B, T].

        Raises:
            ValueError: if the batch does not hold the same number of sequences for each budget.
        """
        bias = self.biases[block]
        if len(bias) == 1:
            return F.linear(hidden_states, self.weights[block], bias[0]).argmax(-1)
        sequences, rest = divmod(len(hidden_states), len(bias))
        if rest or not sequences:
            raise ValueError(f"there are {len(bias)} budgets, but {len(hidden_states)} sequences in the batch")
        own = bias.repeat_interleave(sequences, 0)[:, None]
        return (F.linear(hidden_states, self.weights[block]) + own).argmax(-1)


def mean_ratio(counts: Tensor, table: CostTable) -> float:
    """Mean cost as a ratio of the full network's, from how many tokens took each choice, [2L, N]."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return float(table.expected(shares) / table.full)


def _stacked(blocks: Mapping[int, Tensor]) -> Tensor:
    """[B, T, N] of every block to [B, T, 2L, N]."""
    return torch.stack([blocks[block] for block in sorted(blocks)], -2)
