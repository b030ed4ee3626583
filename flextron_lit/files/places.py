"""Where files of a Flextron folder lie. At the top a loader would take them for weights of the full network."""

from pathlib import Path

ORDER = "elastic/order.safetensors"
"""Per block, where the units stood in the dense model."""
SURROGATE = "elastic/surrogate.safetensors"
"""What predicts losses, the pairs it learned from, and the text they were measured on."""
MOVED = {Path(name).name: name for name in (ORDER, SURROGATE)}
"""Where format 1 had them: at the top."""


def today(name: str) -> str:
    """The place of what lies at some place of a folder of any format."""
    return MOVED.get(name, name)


def file_of(folder: Path, name: str) -> Path:
    """A file by its place; in a folder of format 1 the one at the top."""
    here, earlier = folder / name, folder / Path(name).name
    return earlier if today(earlier.name) == name and earlier.is_file() and not here.is_file() else here
