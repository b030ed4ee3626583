"""KV caches: those that take tokens back (a decode step is undone, a draft is refused), and whose each one is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from flextron_lit.elastic.selection import ActiveSelection, Selection
from flextron_lit.space import ElasticSpace, SubNetwork

ATTRIBUTE = "flextron_filled"
"""Of a cache: what filled it."""
FILLED = "the KV cache was filled"
MEND = "go on with the budget that filled it, or begin with an empty cache"


def retractable(cache: DynamicCache) -> DynamicCache:
    """The same cache; from now on its layers with a sliding window keep what is behind it until `retract` is called."""
    cache.activate_past_recording()
    return cache


def retract(cache: Cache, tokens: int) -> None:
    """Forget so many of the last tokens."""
    for layer in cast(list[Any], cache.layers):
        # a layer whose attention is skipped has read nothing, and some kinds of layers cannot crop that
        if layer.is_initialized:
            layer.cumulative_length.sub_(tokens) if type(layer) is StaticLayer else layer.crop(-tokens)


@dataclass(frozen=True)
class _Filled:
    """What filled a cache; a copy of the cache was filled by the same."""

    by: Selection

    def __deepcopy__(self, memo: Any) -> "_Filled":
        return self


def fill(cache: Any, selection: Selection) -> None:
    """Note what has computed the last keys and values of a cache."""
    known = getattr(cache, ATTRIBUTE, None)
    if known is None or known.by is not selection:
        setattr(cache, ATTRIBUTE, _Filled(selection))


def claim(cache: Any, selection: Selection, space: ElasticSpace) -> None:
    """Refuse a cache whose keys and values are another selection's; one that is empty is anybody's.

    Raises:
        ValueError: naming the block in which they differ.
    """
    known = getattr(cache, ATTRIBUTE, None)
    if known is not None and (known.by is selection or known.by == selection):
        return
    filled = {i: each for i, each in enumerate(cache.layers) if each.is_initialized}
    if not filled or not cache.get_seq_length():
        for layer in filled.values():
            # it may have been made for other numbers of heads, and makes itself anew
            layer.is_initialized = False
        return
    if known is None:
        _check_groups(
            {i: layer.keys.shape[1] for i, layer in filled.items() if layer.keys.dim() == 4}, selection, space
        )
        return
    raise ValueError(f"{FILLED} by {_differs(known.by, selection, space)}; {MEND}")


def check_paged(active: ActiveSelection) -> None:
    """Refuse the cache of continuous batching, which all its requests share, for anything but the full network.

    Raises:
        ValueError: if something else is active, or somebody has the network alone.
    """
    if active.turns.taken or active.current != active.space.full():
        raise ValueError(
            "continuous batching runs the full network alone, in a thread of its own and with one cache of all heads; "
            "for a budget use generate, or export the sub-network"
        )


def _check_groups(found: Mapping[int, int], selection: Selection, space: ElasticSpace) -> None:
    """Of a cache that nobody knows what filled: KV groups by layer."""
    active = space.widths(selection if isinstance(selection, SubNetwork) else space.full())
    for block, width in zip(space.blocks, active, strict=True):
        if block.kind == "attention" and found.get(block.layer, width) != width:
            there = found[block.layer]
            raise ValueError(f"{FILLED} with {there} KV groups in {block.name}, but {width} are active; {MEND}")


def _differs(filler: Selection, selection: Selection, space: ElasticSpace) -> str:
    if not isinstance(filler, SubNetwork):
        return "a policy that chooses for every token, but what is active is not that"
    if not isinstance(selection, SubNetwork):
        return "a sub-network, but a policy that chooses for every token is active"
    widths = zip(space.blocks, space.widths(filler), space.widths(selection), strict=True)
    block, there, here = next(each for each in widths if each[1] != each[2])
    return f"a sub-network that uses {there} units of {block.name}, but the active one uses {here}"
