"""The name `callbacks`: configs say `callbacks.BudgetSampling`, the library `flextron_lit.callbacks`, of one thing.

The word is common. So nothing of ours is installed under it, and whoever has a `callbacks` of their own keeps it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "callbacks"
OURS = f"{__package__}.{NAME}"


class CallbacksName(MetaPathFinder):
    """Finds `callbacks`: nobody's is ours; with `first` somebody's own, where ours stands behind what it lacks.

    Args:
        first: ask before the usual finders, as commands do: a config may then name classes of both.
    """

    def __init__(self, *, first: bool) -> None:
        self.first = first

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Only of the one name; its submodules are known as soon as it is."""
        if name != NAME:
            return None
        theirs = _theirs() if self.first else None
        if theirs is None:
            return ModuleSpec(name, _Alias())
        assert theirs.loader is not None
        theirs.loader = _WithOurs(theirs.loader)
        return theirs


class _Alias(Loader):
    """Puts the library's own module in the place of the empty one that the import system made."""

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module(OURS)
        adopt()


class _WithOurs(Loader):
    """Loads somebody's own module, and looks up with us what it does not have."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        stand_behind(module)


def adopt() -> None:
    """Let `callbacks` and its submodules be the library's own modules, not second copies of them."""
    for name, module in list(sys.modules.items()):
        if name == OURS or name.startswith(f"{OURS}."):
            sys.modules[name.removeprefix(f"{__package__}.")] = module


def stand_behind(module: ModuleType) -> None:
    """Look up in the library's callbacks what a module of that name does not have."""

    def ours(name: str) -> Any:
        # what import machinery and inspection ask every module for is not a class of ours
        if name.startswith("__") or not hasattr(found := importlib.import_module(OURS), name):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}, nor has {OURS}")
        return getattr(found, name)

    module.__dict__.setdefault("__getattr__", ours)


def install(*, first: bool = False) -> None:
    """Answer to the name from now on; see `CallbacksName`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, CallbacksName)]
    sys.meta_path.insert(0 if first else len(sys.meta_path), CallbacksName(first=first))
    known = sys.modules.get(NAME)
    if first and known is not None and known is not sys.modules.get(OURS):
        stand_behind(known)


def _theirs() -> ModuleSpec | None:
    """The first module of that name on the path that is not the checkout's own folder."""
    ours = (Path(__file__).parent / NAME / "__init__.py").resolve()
    for entry in sys.path:
        spec = PathFinder.find_spec(NAME, [entry])
        # a folder without __init__.py has no origin: it is no module of anybody's
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != ours:
            return spec
    return None
