"""What a run folder holds, to compare runs by."""

import json

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)

TIMED = ("train/tokens_per_second", "train/data_wait")


def weights(folder):
    return load_file(folder / "flextron" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def table(folder):
    return json.loads((folder / "training.json").read_text())


def logged(folder):
    """Every scalar with its steps; of the speed only the steps."""
    events = read_events(folder / "tensorboard")
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars | {timed: [step for step, _ in scalars.get(timed, [])] for timed in TIMED}


def pictures(folder):
    """Every figure with its steps."""
    events = read_events(folder / "tensorboard")
    return {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def compared_by(folder):
    """Hyper-parameters, and the final metrics beside them, as TensorBoard compares runs."""
    events = read_events(folder / "tensorboard/hparams")
    rows = events.PluginTagToContent("hparams")
    # TensorBoard would take the columns of every run from the first such declaration
    assert EXPERIMENT_TAG not in rows
    settings = parse_session_start_info_plugin_data(rows[SESSION_START_INFO_TAG]).hparams
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in settings.items()}
    last = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    return values, {tag: (event.step, event.value) for tag, event in last.items()}


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events
