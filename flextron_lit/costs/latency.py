"""The latency table: what `costs/latency-*.json` holds, and whether it belongs to a device and a workload."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from flextron_lit.costs.table import CostTable, weighted_sum
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.differences import differences
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.provenance import versions
from flextron_lit.space import ElasticSpace

FOLDER = "costs"
PREFIX = "latency-"


@dataclass(frozen=True)
class HeldOut:
    """One sub-network that the table was not made from."""

    choices: tuple[int, ...]
    predicted: float
    """Time relative to the full network's, from the table."""
    measured: float
    """The same, measured."""


@dataclass(frozen=True)
class PhaseLatency:
    """One kind of pass of a workload: a prefill, or a decode step."""

    table: CostTable
    """In milliseconds."""
    spread: float
    """Largest spread of a measured ratio to the full network's time: two profiles agree within the sum of theirs."""
    held_out: tuple[HeldOut, ...]
    """The check on sub-networks that differ from layer to layer, spread evenly over cost."""

    @property
    def error(self) -> float | None:
        """Mean absolute error of the predictions, relative to what was measured; None if nothing was held out."""
        if not self.held_out:
            return None
        return mean(abs(row.predicted - row.measured) / row.measured for row in self.held_out)


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of one device for one workload and one model shape."""

    conditions: dict[str, Any]
    """Device, workload, model and versions that the times are those of, JSON-able."""
    phases: dict[Phase, PhaseLatency]

    @property
    def workload(self) -> Workload:
        """The request that was measured."""
        return Workload(**self.conditions["workload"])

    @property
    def file_name(self) -> str:
        """`latency-<kind of device>-<workload>-<dtype>.json`."""
        workload = self.workload
        return f"{PREFIX}{self.conditions['device']['type']}-{workload.name}-{workload.dtype}.json"

    def tables(self) -> dict[str, CostTable]:
        """Every latency as a cost table: `prefill`, `decode` (one step), and `latency`, the whole request."""
        parts = [(count, self.phases[phase].table) for phase, count in self.workload.phases.items()]
        return {**{table.name: table for _, table in parts}, "latency": weighted_sum("latency", parts)}

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a table that was measured under other conditions.

        Args:
            wanted: the conditions that count, some or all of them.

        Raises:
            ValueError: naming what differs.
        """
        found = list(differences({name: self.conditions[name] for name in wanted}, wanted))
        if found:
            raise ValueError(
                f"the latency table {self.file_name} was measured under other conditions:\n  "
                + "\n  ".join(found)
                + "\nMeasure this one with `python main.py profile`"
            )

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "conditions": self.conditions,
            "phases": {
                name: {
                    "table": phase.table.to_json(),
                    "spread": phase.spread,
                    "error": phase.error,
                    "held_out": [asdict(row) for row in phase.held_out],
                }
                for name, phase in self.phases.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Inverse of `to_json`."""
        phases: dict[Phase, PhaseLatency] = {}
        for name, phase in data["phases"].items():
            rows = ({**row, "choices": tuple(row["choices"])} for row in phase["held_out"])
            table = CostTable.from_json(phase["table"])
            phases[name] = PhaseLatency(table, phase["spread"], tuple(HeldOut(**row) for row in rows))
        return cls(dict(data["conditions"]), phases)

    def write(self, checkpoint: Path) -> Path:
        """Write the file into the `costs` folder of a Flextron checkpoint, whole or not at all; returns its path."""
        path = checkpoint / FOLDER / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path


def read_all(folder: Path, space: ElasticSpace) -> dict[Path, LatencyTable]:
    """The latency tables of a Flextron checkpoint, by file.

    Raises:
        ValueError: if one is damaged, or was made for another space.
    """
    found = {path: _read(path) for path in _paths(folder)}
    for table in found.values():
        for each in table.tables().values():
            each.check(space)
    return found


def find(folder: Path, wanted: Mapping[str, Any]) -> tuple[Path, LatencyTable] | None:
    """The table of a folder that was measured under just these conditions, with its file.

    Raises:
        ValueError: if a table is damaged.
    """
    tables = ((path, _read(path)) for path in _paths(folder))
    return next((found for found in tables if not list(differences(found[1].conditions, wanted))), None)


def _paths(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob(f"{PREFIX}*.json"))


def _read(path: Path) -> LatencyTable:
    try:
        return LatencyTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and profile again") from error


def conditions(backbone: ElasticBackbone, workload: Workload) -> dict[str, Any]:
    """What latencies of a model depend on, JSON-able."""
    threads = workload.threads or torch.get_num_threads()
    config = backbone.model.config
    return {
        "device": device_description(backbone.model.device),
        "workload": asdict(replace(workload, threads=threads if backbone.model.device.type == "cpu" else None)),
        "model": {
            "class": type(backbone.model).__name__,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "attention": config._attn_implementation,
            "space": backbone.space.to_json(),
        },
        "versions": versions(),
    }


def device_description(device: torch.device) -> dict[str, str]:
    """Kind and name of a device."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "name": _processor()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
