"""The latency table: what `costs/latency-*.json` holds, and whether it belongs to a device and a workload."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal, Self

import torch

from flextron_lit.costs.table import CostTable, weighted_sum
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.differences import differences
from flextron_lit.files.provenance import versions
from flextron_lit.files.whole_file import write_json
from flextron_lit.latency.device import device_description
from flextron_lit.space import ElasticSpace

FOLDER = "costs"
COMPILED = "compiled"
"""Among the conditions of a table, where it is one of compiled widths."""
Execution = Literal["static", "dynamic"]
"""One sub-network for all tokens, or a width for every token, computed in groups."""
PREFIXES: dict[Execution, str] = {"static": "latency-", "dynamic": "dynamic-"}
"""What the files of each begin with."""


@dataclass(frozen=True)
class HeldOut:
    """One sub-network, or one mixture of choices, that the table was not made from."""

    choices: tuple[int, ...]
    """Of the sub-network; empty for a mixture."""
    predicted: float
    """Time relative to the full network's, from the table; where that was corrected, as the other rows correct it."""
    measured: float
    """The same, measured."""
    mixture: int | None = None
    """Number of the mixture (`mixtures.shares`); None for a sub-network."""

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        row = {"choices": list(self.choices), "predicted": self.predicted, "measured": self.measured}
        return row if self.mixture is None else {**row, "mixture": self.mixture}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**{**row, "choices": tuple(row["choices"])})


@dataclass(frozen=True)
class PhaseLatency:
    """One kind of pass of a workload: a prefill, or a decode step."""

    table: CostTable
    """In milliseconds."""
    spread: float
    """Largest spread of a measured ratio to the full network's time: two profiles agree within the sum of theirs."""
    held_out: tuple[HeldOut, ...]
    """The check on sub-networks or mixtures that differ from layer to layer, spread over cost."""
    correction: float = 1.0
    """The factor that the held out put on what every width saves (`correction.saving_factor`)."""
    rechecked: tuple[HeldOut, ...] = ()
    """The same of others, measured when the table was last taken over by a later run."""

    @property
    def largest_miss(self) -> float | None:
        """Largest difference between predicted and measured, as a share of the full network's time; None unchecked."""
        return max((abs(row.predicted - row.measured) for row in (*self.held_out, *self.rechecked)), default=None)

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
    def execution(self) -> Execution:
        """How the network ran."""
        return self.conditions.get("execution", "static")

    @property
    def compiled(self) -> bool:
        """Whether the network ran by compiled code."""
        return bool(self.conditions.get(COMPILED))

    @property
    def file_name(self) -> str:
        """`latency-<kind of device>-<workload>-<dtype>.json`, `...-compiled.json`, or `dynamic-...`."""
        workload, mode = self.workload, f"-{COMPILED}" if self.compiled else ""
        name = f"{self.conditions['device']['type']}-{workload.name}-{workload.dtype}{mode}"
        return f"{PREFIXES[self.execution]}{name}.json"

    def tables(self) -> dict[str, CostTable]:
        """Every latency as a cost table: `prefill`, `decode` (one step), and `latency`, the whole request."""
        parts = [(count, self.phases[phase].table) for phase, count in self.workload.phases.items()]
        return {**{table.name: table for _, table in parts}, "latency": weighted_sum("latency", parts)}

    @property
    def may_miss(self) -> dict[str, float]:
        """By how much each latency may miss what its table says: the largest miss seen, as a share of the full one's.

        Of the whole request, those of its passes together. Latencies of which nothing was checked are left out.
        """
        largest = {name: phase.largest_miss for name, phase in self.phases.items()}
        seen = {name: miss for name, miss in largest.items() if miss is not None}
        found = {str(name): miss for name, miss in seen.items()}
        if len(seen) == len(self.phases):
            times = {name: phase.table.full for name, phase in self.phases.items()}
            found["latency"] = self.workload.of_request(times, seen)
        return found

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a table that was measured under other conditions.

        Args:
            wanted: the conditions that count, some or all of them.

        Raises:
            ValueError: naming what differs.
        """
        found = list(differences({name: self.conditions.get(name) for name in wanted}, wanted))
        if found:
            option = " --dynamic" if self.execution == "dynamic" else " --compile" if wanted.get(COMPILED) else ""
            raise ValueError(
                f"the latency table {self.file_name} was measured under other conditions:\n  "
                + "\n  ".join(found)
                + f"\nMeasure this one with `python main.py profile{option}`"
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
                    "held_out": [row.to_json() for row in phase.held_out],
                    "correction": phase.correction,
                    "rechecked": [row.to_json() for row in phase.rechecked],
                }
                for name, phase in self.phases.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: if a table is not in milliseconds.
        """
        phases: dict[Phase, PhaseLatency] = {}
        for name, phase in data["phases"].items():
            # tables were neither corrected nor checked again once
            checks = (map(HeldOut.from_json, phase.get(rows, ())) for rows in ("held_out", "rechecked"))
            held_out, rechecked = map(tuple, checks)
            table, correction = CostTable.from_json(phase["table"]), phase.get("correction", 1.0)
            if table.unit != "ms":
                raise ValueError(f"the unit of {name} is {table.unit!r}, not ms")
            phases[name] = PhaseLatency(table, phase["spread"], held_out, correction, rechecked)
        return cls(dict(data["conditions"]), phases)

    def write(self, checkpoint: Path) -> Path:
        """Write the file into the `costs` folder of a Flextron checkpoint, whole or not at all; returns its path."""
        path = checkpoint / FOLDER / self.file_name
        write_json(path, self.to_json())
        return path


def read_all(folder: Path, space: ElasticSpace, execution: Execution = "static") -> dict[Path, LatencyTable]:
    """The latency tables of a Flextron checkpoint that hold for one kind of execution, by file.

    Raises:
        ValueError: if one is damaged, or was made for another space.
    """
    found = {path: _read(path) for path in _paths(folder, execution)}
    for table in found.values():
        for each in table.tables().values():
            each.check(space)
    return found


def find(folder: Path, wanted: Mapping[str, Any]) -> tuple[Path, LatencyTable] | None:
    """The table of a folder that was measured under just these `conditions`, with its file.

    Raises:
        ValueError: if a table is damaged.
    """
    tables = ((path, _read(path)) for path in _paths(folder, wanted.get("execution", "static")))
    return next((found for found in tables if not list(differences(found[1].conditions, wanted))), None)


def origin_of(folder: Path, space: ElasticSpace, cost: CostTable) -> tuple[Path, LatencyTable] | None:
    """The latency table that a cost comes from, such as a router's, with its file; None where none of them has it.

    Raises:
        ValueError: if a table is damaged, or was made for another space.
    """
    for execution in PREFIXES:
        for path, table in read_all(folder, space, execution).items():
            if any(each.sha256 == cost.sha256 for each in table.tables().values()):
                return path, table
    return None


def measured_on(checkpoint: Path) -> set[str]:
    """Types of the devices that a checkpoint's latencies were measured on: `cpu`, `cuda`.

    Raises:
        ValueError: if a table is damaged.
    """
    paths = [path for execution in PREFIXES for path in _paths(checkpoint, execution)]
    return {_read(path).conditions["device"]["type"] for path in paths}


def _paths(folder: Path, execution: Execution) -> list[Path]:
    return sorted((folder / FOLDER).glob(f"{PREFIXES[execution]}*.json"))


def _read(path: Path) -> LatencyTable:
    with damage(path, "delete it and profile again"):
        table = LatencyTable.from_json(read_json(path))
        # made here once, so that what cannot be made of it is damage of this file
        _ = table.file_name, table.tables(), table.may_miss, table.conditions["device"]["name"]
        return table


def conditions(
    backbone: ElasticBackbone, workload: Workload, execution: Execution = "static", *, compiled: bool | None = None
) -> dict[str, Any]:
    """What latencies of a model depend on, JSON-able; unless it is said, it runs by compiled code if it does now."""
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
        # static tables of networks as they are were written before there were others
        **({} if execution == "static" else {"execution": execution}),
        **({COMPILED: True} if (backbone.compiled is not None if compiled is None else compiled) else {}),
    }
