"""A stage that measures losses of sub-networks on fixed text, forward only."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor

from flextron_lit.costs import CostTable
from flextron_lit.files.ranks import gather, tell
from flextron_lit.losses.by_chunk import cross_entropy
from flextron_lit.losses.measured_loss import Batch, MeasuredLoss, batches_of, loss_file
from flextron_lit.routers.budget_prices import Priced, Prices, solve, spendable
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter, mean_ratio
from flextron_lit.routers.pairs import Pairs
from flextron_lit.space import SubNetwork
from flextron_lit.stages.base import Stage
from flextron_lit.stages.stop_on_nan import NonFiniteError
from flextron_lit.terminal.progress import progress


class MeasuringStage(Stage):
    """Losses of sub-networks, on the same tokens, shared out over the ranks, and never measured twice."""

    def forward_context(self) -> AbstractContextManager[None]:
        """As the trainer's precision says."""
        return self.trainer.precision_plugin.forward_context()

    def text_to_measure_on(self, tokens: int, block_size: int) -> dict[str, Tensor]:
        """Training blocks [blocks, T], spread evenly over each domain."""
        batches = self.text.calibration_batches(tokens, block_size=block_size, batch_size=1)
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def measure_on(self, text: Mapping[str, Tensor], batch_size: int) -> None:
        """Choose the blocks that losses are measured on, [blocks, T]; what was measured on them before is known."""
        batches = batches_of(text, batch_size)
        file = loss_file(self.backbone, batches, str(self.trainer.precision))
        self.measured_loss = MeasuredLoss(self.backbone, batches, file=file, forward_context=self.forward_context)

    def losses_of(self, sub_networks: Sequence[SubNetwork], description: str | None = None) -> list[float]:
        """Nats per token, shared out over the ranks; every rank gets all.

        Raises:
            NonFiniteError: if one is not a number: nothing can be learned from it.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        # what one rank knows, none measures; and all measure as many, for they may wait for one another at every layer
        known = dict(
            chain.from_iterable(each.items() for each in gather(self.measured_loss.known(sub_networks), world))
        )
        if known and description:
            tell(f"{description}: {len(known)} of {len(set(sub_networks))} are known already")
        wanted = [each for each in dict.fromkeys(sub_networks) if each not in known]
        own = wanted[rank::world]
        known |= zip(own, self.measured_loss.all(own, description), strict=True)
        self.keep_up(len(own), -(-len(wanted) // world), self.measured_loss.batches)
        everything = merged(gather(known, world))
        losses = [everything[each] for each in sub_networks]
        for sub_network, loss in zip(sub_networks, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(f"the measured loss of sub-network {list(sub_network.choices)} is {loss}")
        return losses

    def keep_up(self, done: int, most: int, batches: Sequence[Batch]) -> None:
        """Where processes wait for one another at every layer, one that has less to run runs the full network.

        Args:
            done: how often this process ran the batches.
            most: how often the busiest did.
            batches: which.
        """
        if self.sharding is None:
            return
        with torch.no_grad(), self.forward_context():
            for _ in range(done, most):
                for batch in batches:
                    self.predictions(batch)

    def measure(
        self, sub_networks: Sequence[SubNetwork], description: str | None = None, *, held_out: bool = False
    ) -> Pairs:
        """The same as pairs to learn from."""
        return Pairs.of(sub_networks, self.losses_of(sub_networks, description), held_out=held_out)

    @torch.no_grad()
    def run_policy(self, policy: DynamicPolicy, batches: Sequence[Batch]) -> tuple[float, float]:
        """Mean cost ratio and loss (nats per token) of a dynamic router on some batches, shared out over the ranks."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        total = torch.zeros(2, dtype=torch.float64)
        with self.forward_context(), self.backbone.use(policy):
            for batch in batches[rank::world]:
                loss, tokens = cross_entropy(self.predictions(batch), batch["labels"])
                total += torch.stack([loss, tokens]).cpu()
        self.keep_up(len(batches[rank::world]), -(-len(batches) // world), batches[:1])
        counts = torch.stack(gather(policy.take(), world)).sum(0)
        loss, tokens = torch.stack(gather(total, world)).sum(0).tolist()
        return mean_ratio(counts, policy.table), loss / tokens

    def find_prices(
        self, router: DynamicRouter, table: CostTable, budgets: Mapping[float, float | None], batches: Sequence[Batch]
    ) -> Prices:
        """Prices at which a dynamic router's mean cost on some batches meets budgets.

        Args:
            router: on the processor.
            table: the cost that it is for.
            budgets: each with a price to start from; None means that of the next larger budget.
            batches: the calibration mix.
        """
        device = self.backbone.model.device
        on_device = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        rows: list[Priced] = []
        for budget in progress(sorted(budgets, reverse=True), "finding the prices of budgets"):
            guess = budgets[budget]
            if guess is None:
                guess = rows[-1].price if rows else 0.0
            rows.append(self._priced(budget, router, table, guess, on_device))
        return Prices(tuple(reversed(rows)))

    def _priced(
        self, budget: float, router: DynamicRouter, table: CostTable, guess: float, batches: Sequence[Batch]
    ) -> Priced:
        model, found = self.backbone.model, dict[float, tuple[float, float]]()

        def mean_cost(price: float) -> float:
            policy = DynamicPolicy(router, table, [budget], [price], device=model.device, dtype=model.dtype)
            found[price] = self.run_policy(policy, batches)
            return found[price][0]

        price = solve(mean_cost, spendable(budget, table), guess)
        return Priced(budget, price, *found[price])


def merged(of_ranks: Sequence[Mapping[SubNetwork, float]]) -> dict[SubNetwork, float]:
    """What any rank knows."""
    return dict(chain.from_iterable(known.items() for known in of_ranks))
