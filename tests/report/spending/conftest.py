"""A run of the dynamic router's stage that is long enough for its tokens to differ."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from flextron_lit import callbacks, checkpoint
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.routers.ladder import Ladder, Rung
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.trained import TrainedRouter
from flextron_lit.stages import DynamicRouterTraining
from tests.options import seed
from tests.stages import training

DOMAINS = {"stories": TextDomain(source="generated:60,0"), "reports": TextDomain(source="generated:60,1")}


@pytest.fixture(scope="session")
def static(tmp_path_factory):
    """A checkpoint with a static router that knows two answers."""
    folder = tmp_path_factory.mktemp("static")
    stage = training.stage()
    training.fit(stage, callbacks.BudgetSampling(k=2), steps=1)
    checkpoint.write(folder / "elastic", stage.backbone, stage.tokenizer, order=stage.order, history=[])
    space, table = stage.backbone.space, COUNTED["flops"](stage.backbone, Workload())
    rungs = [Rung(table.cost(sub), loss, sub) for sub, loss in ((space.smallest(), 6.0), (space.full(), 5.0))]
    router = TrainedRouter(StaticRouter(space, 4, torch.Generator().manual_seed(seed(0))), table, Ladder(tuple(rungs)))
    checkpoint.extend(folder / "elastic", folder / "flextron", files=router.files())
    return folder / "flextron"


@pytest.fixture(scope="session")
def run_folder(static, tmp_path_factory):
    """What the run wrote."""
    folder = tmp_path_factory.mktemp("dynamic")
    stage = DynamicRouterTraining(
        str(static),
        cost="flops",
        guidance="backbone",
        block_size=32,
        calibration_tokens=128,
        prices=2,
        budgets=[0.8, 0.7],
        optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
    )
    stage.attach(TextDataModule(DOMAINS, tokenizer=str(static), block_size=128, validation_tokens=512, test_tokens=128))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="tensorboard"),
        callbacks=[callbacks.BudgetSampling(k=4), callbacks.RouterReport(), callbacks.FlextronCheckpointWriter()],
    )
    trainer.fit(stage)
    return folder
