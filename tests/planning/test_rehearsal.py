"""A plan against real steps, by torch's own tracker; and what of it follows from what else."""

import shutil
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, LlamaConfig

from flextron_lit.planning import stand_ins
from flextron_lit.planning.asked import Shape, TrainingSettings
from flextron_lit.planning.plan import MAKES
from flextron_lit.planning.rehearsal import rehearse
from flextron_lit.space import LayerWidths, SpaceConfig, SubNetwork
from flextron_lit.stages import Calibration, Distillation, ElasticTraining
from tests.stages.training import TINY, fit

LIMIT = 0.1
SETTINGS = TrainingSettings(precision="32-true", batch_size=2, block_size=32)
CHECKPOINTED = replace(SETTINGS, activation_checkpointing=True)
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(vocab_size=260, num_hidden_layers=5, tie_word_embeddings=True, **LLAMA),
    "gpt2": GPT2Config(vocab_size=260, n_layer=5, n_embd=64, n_head=4, n_positions=64),
}


def shape(family="llama", **differences):
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict() | differences)
    return Shape(config, SpaceConfig(attention=[0.25, 0.5, 1.0]))


def took(made):
    """Bytes of a step at its peak."""
    return sum(made.parts().values())


class Bytes(MemTracker):
    """Torch's, of all tensors: it refuses modules that run more than once."""

    def _ignore(self, *_):
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore


class Measured(Callback):
    """The peak of a real step, with what the optimizer keeps from the steps before."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        blocks = pl_module.backbone.space.blocks
        pl_module.plan = [SubNetwork(tuple(max(0, len(block.widths) - 2) for block in blocks))]
        (optimizer,) = trainer.optimizers
        for parameter in pl_module.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        self.tracker = Bytes()
        self.tracker.track_external(*pl_module.networks(), optimizer, *batch.values())
        self.tracker.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.tracker.__exit__(None, None, None)
        (found,) = self.tracker.get_tracker_snapshot("peak").values()
        self.peak = found["Total"]


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return request.param


def test_a_plan_is_what_a_real_step_takes(family, tmp_path):
    """Through the Trainer, from the dense model; the control is the plan of other settings."""
    folder = shutil.copytree(TINY.removeprefix("random:"), tmp_path / family)
    CONFIGS[family].save_pretrained(folder)
    stage = ElasticTraining(
        f"random:{folder}",
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        space=shape(family).space,
        calibration=Calibration(tokens=64, excess_tokens=0, importance="magnitude"),
        distillation=Distillation(sampled_from_full=1.0, full_from_original=1.0),
    )
    measured = Measured()
    fit(stage, measured)
    settings = replace(SETTINGS, optimizer="adamw_fused", from_original=True)
    found = rehearse(stand_ins.elastic, shape(family), settings)
    assert took(found) == pytest.approx(measured.peak, rel=LIMIT)
    others = replace(settings, from_original=False), replace(settings, activation_checkpointing=True)
    for other in others:
        assert took(rehearse(stand_ins.elastic, shape(family), other)) < (1 - LIMIT) * measured.peak


@pytest.mark.parametrize("make", dict.fromkeys(MAKES.values()))
def test_a_few_layers_say_what_all_take(make):
    """Against a rehearsal of all of them; the control has fewer."""
    seven, four = (shape(num_hidden_layers=layers) for layers in (7, 4))
    # a layer that has widths of its own is not taken to be like the others
    whole = replace(seven, space=replace(seven.space, layers={6: LayerWidths()}))
    assert seven.alike
    assert not whole.alike
    few, fewer, all_of_them = (rehearse(make, each, CHECKPOINTED) for each in (seven, four, whole))
    assert took(few) == pytest.approx(took(all_of_them), rel=1e-3)
    assert few.flops == pytest.approx(all_of_them.flops, rel=1e-6)
    assert took(fewer) < 0.99 * took(few)


def test_processes_share_what_is_there_before_a_step():
    """Of what a step makes on the way, whole layers among it, each has all."""
    alone, two, four = (rehearse(stand_ins.elastic, shape(), CHECKPOINTED, count) for count in (1, 2, 4))
    for name in ("network", "own_projections", "optimizer"):
        assert two.held[name] == pytest.approx(alone.held[name] / 2, rel=0.01)
    assert took(two) < took(alone)
    assert took(two.shared_by(4)) == pytest.approx(took(four), rel=0.02)
    # the control: what is not shared out
    assert took(two) > 1.1 * took(four)
    assert took(two) > took(alone) / 2


def test_settings_take_less_where_they_are_to():
    """Each part by itself, where it is at the peak."""
    few = replace(CHECKPOINTED, batch_size=1, block_size=8)
    adamw, eight_bit = (
        rehearse(stand_ins.elastic, shape(), replace(few, optimizer=optimizer)).parts()
        for optimizer in ("adamw", "adamw_8bit")
    )
    # small parameters keep their states in float32
    assert 0.25 < eight_bit["optimizer"] / adamw["optimizer"] < 0.5
    assert eight_bit["update"] == 0 < adamw["update"]
    many = replace(CHECKPOINTED, block_size=64, optimizer="adamw_8bit", loss_chunk=0)
    at_once, chunked = (
        rehearse(stand_ins.elastic, shape(), replace(many, loss_chunk=chunk)).parts() for chunk in (0, 8)
    )
    assert chunked["logits"] < at_once["logits"] / 4
