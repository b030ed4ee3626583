"""Which of a checkpoint's routers know the latencies that it holds now."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from flextron_lit.latency.latency_table import origin_of
from flextron_lit.routers.trained import KeptRouter
from flextron_lit.space import ElasticSpace

Router = TypeVar("Router", bound=KeptRouter)


def in_force(routers: Sequence[Router], folder: Path, space: ElasticSpace) -> list[Router]:
    """Those that no fresh latency table has put aside: of several for a latency, the ones whose table is there.

    A router goes on answering by the table that it was trained for, and its files stay; but whatever shows or tunes one
    for a latency takes the one for what was measured last.

    Args:
        routers: of one kind.
        folder: their Flextron checkpoint.
        space: its choices.

    Raises:
        ValueError: if a latency table is damaged.
    """
    by_table = {router.table.sha256: router for router in routers}
    known = {
        sha256
        for sha256, router in by_table.items()
        if router.table.unit != "ms" or origin_of(folder, space, router.table) is not None
    }
    named = {by_table[sha256].table.name for sha256 in known}
    return [router for sha256, router in by_table.items() if sha256 in known or router.table.name not in named]
