"""How many tokens a network reads at once: a table of positions has an end, rotations are stretched or get worse."""

from functools import cache

from transformers import PreTrainedConfig

from flextron_lit.files.ranks import tell

STRETCHED = ("linear", "dynamic")
"""Rotations whose config says for how many positions the network was before; others say for how many it is."""


def readable(config: PreTrainedConfig) -> int:
    """Tokens that a network reads at once as it is meant to."""
    rotation = getattr(config, "rope_parameters", None) or {}
    factor = rotation.get("factor") if rotation.get("rope_type") in STRETCHED else None
    return int(config.max_position_embeddings * (factor or 1.0))


def is_bounded(config: PreTrainedConfig) -> bool:
    """Whether positions are learnt, so that there is nothing to read behind the last one."""
    return getattr(config, "rope_parameters", None) is None


def demand_positions(config: PreTrainedConfig, tokens: int, what: str, remedy: str) -> None:
    """Refuse more tokens at once than there are positions; where positions are rotations, say so once.

    Args:
        config: of the network.
        tokens: to be read at once.
        what: takes so many.
        remedy: what to do about it.

    Raises:
        ValueError: if positions are learnt, and there are fewer.
    """
    if tokens <= readable(config):
        return
    if is_bounded(config):
        raise ValueError(f"{what} takes {tokens} positions, but the model has {readable(config)}; {remedy}")
    _note(f"note: {what} takes {tokens} positions, but the model was made for {readable(config)}: worse beyond")


@cache
def _note(line: str) -> None:
    tell(line)
