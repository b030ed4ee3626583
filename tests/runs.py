"""What a run folder holds, to compare runs by."""

import json

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def weights(folder):
    return load_file(folder / "flextron" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def table(folder):
    return json.loads((folder / "training.json").read_text())


def logged(folder):
    """Every scalar with its steps; of the speed only the steps."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    timed = "train/tokens_per_second"
    return scalars | {timed: [step for step, _ in scalars.get(timed, [])]}
