"""What tests of stages share: a tiny model, text and trainer, and callbacks that plan steps and keep gradients."""

from lightning.pytorch import Callback, Trainer

from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages import Calibration, ElasticTraining
from tests.front_door import ROOT

TINY = f"random:{ROOT / 'configs/models/tiny-llama'}"
SPACE = SpaceConfig(mlp=[0, 32, 64, 128], attention=[0, 1, 2, 4])
PLAN = [SubNetwork((1, 2, 2, 1, 3, 0)), SubNetwork((0, 1, 1, 1, 1, 1))]


class Plan(Callback):
    def __init__(self, plan=PLAN):
        self.plan = plan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.plan = self.plan


class Gradients(Callback):
    """Keeps the gradients of the first update, before clipping, and the batches that led to it."""

    def __init__(self):
        self.batches = []
        self.kept = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.kept is None:
            self.batches.append(batch)
            self.weights = {n: p.detach().clone() for n, p in pl_module.model.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.kept is None:
            self.kept = {n: p.grad.clone() for n, p in pl_module.model.named_parameters()}


def text(**settings):
    defaults = {"tokenizer": TINY, "block_size": 32, "batch_size": 2, "validation_tokens": 64, "test_tokens": 64}
    return TextDataModule({"stories": TextDomain(source="generated:60,0")}, **(defaults | settings))


def stage(**settings):
    defaults = {"space": SPACE, "calibration": Calibration(tokens=0), "clip_norm": 1e9}
    return ElasticTraining(TINY, **(defaults | settings))


def fit(module, *callbacks, steps=1, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **({"limit_val_batches": 0, "callbacks": list(callbacks)} | settings),
    )
    trainer.fit(module, datamodule=text())
    return trainer


def sum_of_losses(module, batches, plan, full_weight=1.0):
    """Reference: the gradients of Hugging Face's own losses, weighted and added up."""
    module.zero_grad()
    for batch in batches:
        inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
        for sub_network, weight in [(module.backbone.space.full(), full_weight), *((s, 1.0) for s in plan)]:
            with module.backbone.use(sub_network):
                loss = module.model(**inputs, labels=batch["labels"], use_cache=False).loss
                (loss * weight / len(batches)).backward()
    return {n: p.grad for n, p in module.model.named_parameters()}
