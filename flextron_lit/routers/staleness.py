"""What becomes of surrogate and routers when the network changes that they were made for, or the surrogate itself."""

from pathlib import Path

from flextron_lit.files.places import SURROGATE
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter, TrainedSurrogate
from flextron_lit.space import ElasticSpace


def all_routers(folder: Path, space: ElasticSpace) -> list[TrainedRouter | TrainedDynamicRouter]:
    """The static and dynamic routers of a Flextron checkpoint.

    Raises:
        ValueError: if a file is damaged, or belongs to another space.
    """
    return [*TrainedRouter.read_all(folder, space), *TrainedDynamicRouter.read_all(folder, space)]


def stale_note(what: str, stage: str) -> str:
    """What to say of something that was made for the network before a stage changed it."""
    return f"{what} is stale: {stage} has changed the network since, so train it again"


def stale_files(folder: Path, space: ElasticSpace, stage: str) -> dict[str, bytes]:
    """Surrogate and routers of a Flextron checkpoint, marked by the stage that changed the network.

    Raises:
        ValueError: if a file is damaged, or belongs to another space.
    """
    surrogate = TrainedSurrogate.read(folder, space)
    files = {} if surrogate is None else {SURROGATE: surrogate.stale_since(stage).to_bytes()}
    for router in all_routers(folder, space):
        files |= router.stale_since(stage).files()
    return files


def measured_files(folder: Path, space: ElasticSpace) -> dict[str, bytes]:
    """The routers of a Flextron checkpoint whose losses were measured on its network: true whatever a surrogate says.

    Raises:
        ValueError: if a file is damaged, or belongs to another space.
    """
    files: dict[str, bytes] = {}
    for router in all_routers(folder, space):
        measured = isinstance(router, TrainedDynamicRouter) or router.ladder.measured
        if measured and not router.stale:
            files |= router.files()
    return files
