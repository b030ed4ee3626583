"""The matrix: every family, kind of sub-network and format, exported once and loaded once elsewhere."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_lit.commands.export import command
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.routers.from_budget import Selection, to_json
from flextron_lit.space import SubNetwork
from tests.conftest import with_compensation
from tests.export.families import MAKE, SPACE, VOCABULARY, write_checkpoint
from tests.options import seed, threads

KINDS = {
    "full": lambda space: space.full(),
    "uniform": lambda space: space.uniform(0.5, 0.75),
    "narrow-mlp": lambda space: space.uniform(0.5),
    "differ": lambda _: SubNetwork((2, 1, 1, 3, 2, 2)),
    "skips": lambda _: SubNetwork((1, 2, 0, 1, 3, 0)),
    "fewer-layers": lambda _: SubNetwork((2, 3, 0, 0, 3, 3)),
}
FORMATS = ("hf", "gguf")
ELSEWHERE = Path(__file__).parent / "elsewhere.py"


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: what the export said, and where it is."""

    folder: Path
    refusal: str | None


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(folder / family, make()) for family, make in MAKE.items()}


@pytest.fixture(scope="session")
def backbones():
    return {family: with_compensation(ElasticBackbone(make(), SPACE)) for family, make in MAKE.items()}


@pytest.fixture(scope="session")
def selections(backbones, tmp_path_factory):
    """Files as `select --output` writes them."""
    folder = tmp_path_factory.mktemp("selections")
    for family, backbone in backbones.items():
        for kind, choose in KINDS.items():
            selection = Selection("0.7", choose(backbone.space), "by hand", None)
            (folder / f"{family}-{kind}.json").write_text(json.dumps(to_json(selection, backbone.space, {})))
    return folder


def export(checkpoint, selection, folder, *options):
    """Run the command in this process; the refusal, if it is one."""
    arguments = (
        "--checkpoint",
        checkpoint,
        "--sub_network",
        selection,
        "--output",
        folder,
        "--device",
        "cpu",
        *options,
    )
    try:
        command([str(argument) for argument in arguments])
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def matrix(root, checkpoints, selections):
    """Every cell, by family, kind and format."""
    cells = {}
    for family in MAKE:
        for kind in KINDS:
            for form in FORMATS:
                folder = root / f"{family}-{kind}-{form}"
                refusal = export(checkpoints[family], selections / f"{family}-{kind}.json", folder, "--format", form)
                cells[family, kind, form] = Cell(folder, refusal)
    export(checkpoints["llama"], selections / "llama-full.json", root / "llama-int8", "--quantize", "int8")
    export(checkpoints["llama"], selections / "llama-skips.json", root / "llama-own-int8", "--quantize", "int8")
    return cells


@pytest.fixture(scope="session")
def ids():
    return torch.randint(1, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(seed(5)))


@pytest.fixture(scope="session")
def elsewhere(matrix, root, ids, tmp_path_factory):
    """What a process without flextron_lit finds in every folder, by its name: tensors, and a note."""
    save_file({"ids": ids}, root / "ids.safetensors")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")),
        "OMP_NUM_THREADS": str(threads()),
    }
    done = subprocess.run(
        [sys.executable, "-I", str(ELSEWHERE), str(root)],
        env=environment,
        cwd=tmp_path_factory.mktemp("cwd"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notes = {path.stem: json.loads(path.read_text()) for path in (root / "results").glob("*.json")}
    return {name: (load_file(root / "results" / f"{name}.safetensors"), note) for name, note in notes.items()}
