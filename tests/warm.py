"""Imported once by the server from which tests fork their commands: what takes seconds to load, and nothing is run."""

import gc
from importlib import import_module

SLOW_TO_LOAD = (
    "torch.utils.tensorboard",
    "tensorboard.backend.event_processing.event_accumulator",
    "lightning.pytorch.cli",
    "lightning.pytorch.loggers",
    "torchmetrics",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "jsonargparse",
    "matplotlib.pyplot",
    "rich.console",
    # ours: what they in turn import is loaded with them, wherever it lies
    "flextron_lit.callbacks",
    "flextron_lit.commands",
    "flextron_lit.model",
    "flextron_lit.stages",
)

for name in SLOW_TO_LOAD:
    import_module(name)
# children share these pages for as long as no collection writes to them
gc.freeze()
