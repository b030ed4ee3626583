"""Branches compiled by AOTInductor: code that is kept on disk, so a machine compiles each but once."""

import json
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.export import Dim, ExportedProgram

from flextron_lit.elastic.compiled.branch import Branch
from flextron_lit.files.cache_folder import intact
from flextron_lit.files.digest import sha256_of, sha256_of_json
from flextron_lit.files.whole_file import write_json

Tensors = dict[str, Tensor]
Names = tuple[str, ...]
Code = Callable[[list[Tensor]], list[Tensor]]
"""Takes what `Branch` takes and gives its one output, in a list; it checks nothing."""
Trace = Callable[[], tuple[ExportedProgram, Names]]
"""Gives a graph, and the names of the weights that it takes."""
KIND, FILE, WEIGHTS, DEVICE = "compiled", "branch.pt2", "weights.json", "gpu.json"
BATCH, TOKENS, ROOM = Dim("batch", min=2), Dim("tokens", min=2), Dim("room", min=3)
"""Sizes that one compilation serves all of: sequences and tokens of a pass that has several, and places of a static
cache, which has room for one more."""
SIZES: dict[str, dict[int, Any]] = {
    "hidden": {0: BATCH, 1: TOKENS},
    "base": {0: BATCH, 1: TOKENS},
    "cos": {0: BATCH, 1: TOKENS},
    "sin": {0: BATCH, 1: TOKENS},
    "mask": {0: BATCH, 2: TOKENS, 3: ROOM},
    "keys": {0: BATCH, 2: ROOM},
    "values": {0: BATCH, 2: ROOM},
}
"""Dimensions of inputs that are such sizes."""


def traced(branch: Branch, given: Tensors, weights: Tensors) -> ExportedProgram:
    """The graph of a branch, for any sizes that differ from pass to pass.

    Args:
        branch: what to trace.
        given: its inputs by name, as a pass has them.
        weights: its weights by name.
    """
    shapes = [*(_sizes(name, given) for name in branch.inputs), *({} for _ in branch.weights)]
    tensors = [*(given[name] for name in branch.inputs), *(weights[name] for name in branch.weights)]
    with torch.no_grad():
        return torch.export.export(branch, (tensors,), dynamic_shapes=(shapes,))


def _sizes(name: str, given: Tensors) -> dict[int, Any]:
    # what is 1 is a graph of its own
    found = {dim: size for dim, size in SIZES.get(name, {}).items() if given[name].shape[dim] > 1}
    if name == "mask" and "keys" not in given:
        # without a cache the tokens of a pass see those of the pass
        found = {dim: TOKENS if size is ROOM else size for dim, size in found.items()}
    return found


def weights_read(program: ExportedProgram, branch: Branch) -> Names:
    """The weights that a graph reads: of what narrower widths have of their own, those of one width."""
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    own = places[len(places) - len(branch.weights) :]
    return tuple(name for name, node in zip(branch.weights, own, strict=True) if node.users)


def aot_inductor(what: Any, device: torch.device, trace: Trace) -> tuple[Code, Names, bool]:
    """Code of a graph for this machine, and as many threads as torch takes now.

    Args:
        what: all that the graph depends on but the libraries.
        device: where it runs.
        trace: gives the graph, if the code is not there yet.

    Returns:
        The code, the names of the weights that it takes, and whether it was compiled just now.

    Raises:
        ValueError: if it cannot be compiled here, as without a C++ compiler.
    """
    made = False

    def make(folder: Path) -> None:
        nonlocal made
        made = True
        program, names = trace()
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns of its own use of its own trees
            warnings.simplefilter("ignore", FutureWarning)
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / FILE))
        write_json(folder / WEIGHTS, names)
        write_json(folder / DEVICE, device.type == "cuda")

    try:
        found = intact(KIND, _key(what, device), make, _load)
    except (RuntimeError, ImportError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"this machine cannot compile ({reason}): install a C++ compiler (g++), or go on without compiled widths"
        ) from error
    if found is None:
        raise ValueError("what was compiled cannot be loaded, not even the second time; go on without compiled widths")
    return *found, made


def _load(folder: Path) -> tuple[Code, Names] | None:
    try:
        gpu = bool(json.loads((folder / DEVICE).read_text()))
        # what the loaded object itself does is to sort its inputs into a list, at a third of a small branch's time;
        # what waits for other threads cannot be recorded
        loaded = torch._inductor.aoti_load_package(str(folder / FILE), run_single_threaded=gpu)
        code: Code = _one_by_one(loaded.loader.boxed_run) if gpu else loaded.loader.boxed_run
        return code, tuple(json.loads((folder / WEIGHTS).read_text()))
    except (RuntimeError, OSError, ValueError):
        return None


def _one_by_one(code: Code) -> Code:
    lock = threading.Lock()

    def run(tensors: list[Tensor]) -> list[Tensor]:
        with lock:
            return code(tensors)

    return run


def _key(what: Any, device: torch.device) -> str:
    gpu = device.type == "cuda"
    return sha256_of_json(
        {
            "what": what,
            "versions": [torch.__version__, transformers.__version__, _sources()],
            "machine": str(torch.cuda.get_device_properties(device)) if gpu else torch.cpu.get_capabilities(),
            "threads": None if gpu else torch.get_num_threads(),
        }
    )


@cache
def _sources() -> list[str]:
    """Digests of the files that say what a branch computes."""
    return [sha256_of(path) for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
