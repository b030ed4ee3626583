"""Other libraries' trainers on a FlextronModel: they train it, save it, and what they saved loads."""

import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from flextron_lit import FlextronModel
from tests.conftest import with_compensation
from tests.options import seed
from tests.served import write

TOKENS = torch.randint(1, 250, (1, 12), generator=torch.Generator().manual_seed(seed(5)))
TEXTS = ["Ada feeds the owl.", "The owl sleeps all day long.", "Nobody feeds Ada.", "All owls are awake at night."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("trainers") / "flextron")


def arguments(made, output, **settings):
    return made(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def trainer(model, output, **settings):
    model.tokenizer.pad_token = model.tokenizer.eos_token
    rows = Dataset.from_list([model.tokenizer(text) for text in TEXTS])
    collator = DataCollatorForLanguageModeling(model.tokenizer, mlm=False)
    return Trainer(
        model,
        arguments(TrainingArguments, output, **settings),
        train_dataset=rows,
        data_collator=collator,
        processing_class=model.tokenizer,
    )


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def test_the_trainer(folder, tmp_path):
    model = FlextronModel.from_pretrained(folder)
    before = logits(model)
    trained = trainer(model, tmp_path)
    trained.train()
    trained.save_model()
    assert not torch.equal(logits(model), before)
    # its checkpoints are still there, and both are Flextron checkpoints
    assert json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())["global_step"] == 1
    for place in (tmp_path, tmp_path / "checkpoint-2"):
        again = FlextronModel.from_pretrained(place)
        assert torch.equal(logits(again), logits(model))
        assert "stale: training in Python" in again.set_budget(0.6).how
    # resumed, it ends as it would have
    resumed = FlextronModel.from_pretrained(folder)
    trainer(resumed, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.allclose(logits(resumed), logits(model), atol=1e-5)


def test_the_trainer_within_a_budget_trains_own_projections_too(folder, tmp_path):
    model = FlextronModel.from_pretrained(folder)
    with_compensation(model.backbone)
    own = {name: each.clone() for name, each in model.backbone.compensations.items()}
    model.set_budget(0.6)
    trainer(model, tmp_path).train()
    moved = [name for name, each in model.backbone.compensations.items() if not torch.equal(each, own[name])]
    assert moved
    assert len(moved) < len(own)
    again = FlextronModel.from_pretrained(tmp_path / "checkpoint-2")
    again.set_budget(0.6)
    assert torch.equal(logits(again), logits(model))
    # its own way to go on reads the full network's weights alone
    with pytest.raises(ValueError, match="load the folder with FlextronModel.from_pretrained"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_supervised_finetuning_with_an_adapter(folder, tmp_path):
    model = FlextronModel.from_pretrained(folder)
    model.tokenizer.pad_token = model.tokenizer.eos_token
    trained = SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path, bf16=False, max_length=16),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=model.tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    before = logits(FlextronModel.from_pretrained(folder))
    trained.train()
    trained.save_model()
    again = PeftModel.from_pretrained(FlextronModel.from_pretrained(folder), tmp_path)
    for budget in (1.0, 0.6):
        trained.model.set_budget(budget)
        again.set_budget(budget)
        assert torch.allclose(logits(again), logits(trained.model), atol=1e-6)
        assert not torch.allclose(logits(again), before, atol=1e-2)


def test_accelerate(folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = with_compensation(FlextronModel.from_pretrained(folder).backbone).model
    model.set_budget(0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(TOKENS, labels=TOKENS).loss)
    optimizer.step()
    expected = logits(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "saved", is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(prepared)
    )
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(model), expected)
    again = FlextronModel.from_pretrained(tmp_path / "saved")
    again.set_budget(0.6)
    assert torch.equal(logits(again), expected)
