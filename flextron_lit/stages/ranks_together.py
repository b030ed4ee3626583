"""What the processes of a run do together: share the network out, reduce gradients, stop before the same update."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.sharding import gathered, is_shared_out, own_part, shard
from flextron_lit.files.ranks import gather
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.stages.data_wait import WaitingForData
from flextron_lit.stages.fully_sharded import FullySharded
from flextron_lit.stages.precision import WeightsAlone
from flextron_lit.stages.stop_on_nan import NonFiniteError, not_finite

TOLERANCE = 1e-4
"""By how much sums of squares of the same gradients may differ between processes: they are added up in any order."""


class RanksTogether(WaitingForData):
    """Base of all stages. Every process comes by each of these calls, or the others wait for it."""

    backbone: ElasticBackbone
    _agreed = False

    @property
    def place(self) -> tuple[int, int]:
        """Rank of this process, and how many there are: of a batch of all of them, it has its own rows in turn."""
        return self.trainer.global_rank, self.trainer.world_size

    # --- the network --------------------------------------------------------------------------------------------

    @property
    def sharding(self) -> FullySharded | None:
        """The strategy, where it shares the network out over all processes."""
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, FullySharded) else None

    def networks(self) -> Iterator[PreTrainedModel]:
        """What is shared out, layer by layer: the backbone, and others of its family."""
        yield self.backbone.model

    def share_out(self, strategy: FullySharded) -> None:
        """Leave this process its rows of every network's weights.

        Raises:
            ValueError: if a setting needs whole weights.
        """
        if getattr(self.options, "compiled", False):
            raise ValueError(
                "compiled code reads whole weights, and trainer.strategy fsdp2 leaves each process a part of them; set "
                "model.init_args.compiled to false, or take ddp"
            )
        if getattr(self.options, "loss_chunk", None):
            raise ValueError(
                "loss_chunk runs the head for some tokens at a time, and trainer.strategy fsdp2 has it whole in a pass "
                "alone; leave loss_chunk out, or take ddp"
            )
        averaging = [each for each in self.trainer.callbacks if isinstance(each, WeightAveraging)]  # type: ignore[attr-defined]
        if averaging:
            raise ValueError(
                f"{type(averaging[0]).__name__} copies whole weights, and trainer.strategy fsdp2 leaves each process a "
                "part of them; take it out, or take ddp"
            )
        precision: Any = self.trainer.precision_plugin
        if isinstance(precision, WeightsAlone):
            precision.convert_module(self)
        for network in self.networks():
            layers, bf16 = self.backbone.family.layers, self.trainer.precision == "bf16-mixed"
            shard(network, layers, strategy.mesh, bf16=bf16)

    def held_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What this process has of each parameter of the stage, by name."""
        return ((name, own_part(parameter)) for name, parameter in self.named_parameters())

    def gathered_weights(self) -> dict[str, Tensor]:
        """A shared-out backbone's weights as a whole, on the processor of the first process; else nothing."""
        if self.sharding is None:
            return {}
        model = self.backbone.model
        tied = set(model.all_tied_weights_keys)
        named = ((name, weight) for name, weight in model.state_dict().items() if name not in tied)
        return dict(gathered(named, keep=self.trainer.is_global_zero))

    # --- gradients ----------------------------------------------------------------------------------------------

    def share_of_tokens(self, labels: Tensor) -> float:
        """By how much a mean over this process's predicted tokens counts, so that the mean over processes is of all.

        Args:
            labels: [B, T], of this process's batch.
        """
        if self.trainer.world_size == 1:
            return 1.0
        own = (labels[:, 1:] != IGNORED).sum().double()
        mean = self.trainer.strategy.reduce(own.clone(), reduce_op="mean")
        return float(own / mean.clamp(min=1 / self.trainer.world_size))

    def unreduced(self) -> Sequence[torch.nn.Parameter]:
        """Whose gradients the strategy leaves to the stage: where it shares a network out, those of all else."""
        return [] if self.sharding is None else [each for each in self.parameters() if not is_shared_out(each)]

    def reduce_gradients(self) -> None:
        """Mean over processes of the gradients that the strategy does not reduce; before they are clipped.

        A parameter that no process used has no gradient, so that the update neither moves nor decays it.

        Raises:
            ValueError: at the first update of a process, if gradients differ then.
        """
        if self.trainer.world_size == 1:
            return
        strategy, own = self.trainer.strategy, self.unreduced()
        # tokens that choose their own widths may do so differently on each rank
        ran = torch.tensor([float(parameter.grad is not None) for parameter in own], device=self.device)
        for parameter, ranks in zip(own, strategy.reduce(ran, reduce_op="sum").tolist(), strict=True):
            if ranks:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = strategy.reduce(gradient, reduce_op="mean")
        if not self._agreed:
            self.check_gradients_agree()

    def check_gradients_agree(self) -> None:
        """Whoever trains alone has other gradients than the others: a sum of squares says so.

        Rows of a shared-out network have none in common, and were added up to be there at all.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None and not is_shared_out(p)]
        self._agreed = bool(gradients)
        sums = gather(sum(float(each.double().square().sum()) for each in gradients), self.trainer.world_size)
        # what is not finite stops the run elsewhere, with its reason
        if max(sums) - min(sums) > TOLERANCE * max(sums):
            shown = ", ".join(f"{each:.6g}" for each in sums)
            raise ValueError(
                f"gradients differ between processes (sums of squares: {shown}), so each would train alone: "
                f"trainer.strategy {type(self.trainer.strategy).__name__} does not reduce them; take ddp or fsdp2"
            )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Where Lightning makes the updates."""
        if self.automatic_optimization:
            self.reduce_gradients()

    # --- stopping -----------------------------------------------------------------------------------------------

    def check_finite(self, values: Mapping[str, Tensor], more: str = "") -> None:
        """Stop before the update, on every process, if a loss or gradient of any of them is not a number.

        Args:
            values: numbers, by what they are in words.
            more: what else there is to say of them.

        Raises:
            NonFiniteError: naming the step, and of several processes the one.
        """
        ranks = self.trainer.world_size
        fine = torch.stack([value.detach().double() for value in values.values()]).isfinite().all()
        if self.trainer.strategy.reduce_boolean_decision(bool(fine)):
            return
        lost = [(name, value.item()) for name, value in values.items() if not value.isfinite()]
        for rank, found in enumerate(gather(lost, ranks)):
            if found:
                where = f" on process {rank} of {ranks}" if ranks > 1 else ""
                raise NonFiniteError(not_finite(*found[0], self.trainer.global_step, where + more))


def zero_of(module: torch.nn.Module) -> Tensor:
    """0 that every parameter takes part in: data-parallel ranks wait for the gradients of all of them."""
    return 0.0 * torch.stack([parameter.sum() for parameter in module.parameters()]).sum()
