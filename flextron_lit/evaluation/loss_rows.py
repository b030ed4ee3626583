"""Losses of several networks on the same texts: rows for files, a table for people."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.evaluation.bootstrap_intervals import interval
from flextron_lit.evaluation.document_losses import Losses, document_losses, pooled
from flextron_lit.evaluation.networks import Network
from flextron_lit.evaluation.texts import Texts
from flextron_lit.routers.dynamic import DynamicPolicy, mean_ratio
from flextron_lit.space import SubNetwork
from flextron_lit.stages.validation import FULL, STATIC, perplexity
from flextron_lit.terminal.console import table

ALL = "all texts"
Row = dict[str, Any]


@dataclass
class Measurement:
    """Losses of networks on some texts; no sub-network is measured twice.

    Args:
        backbone: the elastic network, in its mode and on its device.
        texts: batches by name.
    """

    backbone: ElasticBackbone
    texts: Texts
    _known: dict[SubNetwork, dict[str, Losses]] = field(default_factory=dict)

    def loss(self, sub_network: SubNetwork) -> float:
        """Nats per token over all texts."""
        return pooled(list(self.of(sub_network, "a uniform sub-network").values())).mean

    def of(self, sub_network: SubNetwork, name: str) -> dict[str, Losses]:
        """Losses of a sub-network by text."""
        if sub_network not in self._known:
            self._known[sub_network] = {
                text: document_losses(self.backbone, sub_network, batches, f"{name}: {text}")
                for text, batches in self.texts.items()
            }
        return self._known[sub_network]

    def take(self, network: Network) -> tuple[dict[str, Losses], dict[str, Mapping[str, float]]]:
        """Losses and costs of any network by text, and over all texts where there are several."""
        costs: dict[str, Mapping[str, float]]
        if isinstance(network.selection, DynamicPolicy):
            policy, losses, counts = network.selection, {}, {}
            for text, batches in self.texts.items():
                losses[text] = document_losses(self.backbone, policy, batches, f"{network.name}: {text}")
                counts[text] = policy.take()
            counts[ALL] = torch.stack(list(counts.values())).sum(0)
            costs = {text: {policy.table.name: mean_ratio(count, policy.table)} for text, count in counts.items()}
        else:
            assert isinstance(network.selection, SubNetwork)
            losses = dict(self.of(network.selection, network.name))
            costs = dict.fromkeys((*losses, ALL), network.ratios)
        if len(losses) > 1:
            losses[ALL] = pooled(list(losses.values()))
        return losses, costs


def measure(measurement: Measurement, networks: Sequence[Network], seed: int) -> list[Row]:
    """Rows of every network and text: loss, perplexity and costs, with intervals.

    Differences are to the full network and, for what answers the same budget otherwise, to the static router's answer.
    """
    found: list[Row] = []
    of_full: dict[str, Losses] = {}
    of_static: dict[str | None, dict[str, Losses]] = {}
    # the full network comes first, and the static one first of its budget
    for network in networks:
        losses, costs = measurement.take(network)
        over = {"over_full": of_full, "over_static": of_static.get(network.budget, {})}
        if network.way == FULL:
            of_full = losses
        if network.way == STATIC:
            of_static[network.budget] = losses
        for text, each in losses.items():
            row = {**network.about(), "text": text, "documents": len(each.total), "tokens": int(each.tokens.sum())}
            row |= {"costs": dict(costs[text]), "loss": each.mean, "interval": interval(each, seed)}
            row |= {"perplexity": perplexity(each.mean)}
            row |= {name: _difference(each, other.get(text), seed) for name, other in over.items()}
            found.append(row)
    return found


def _difference(ours: Losses, theirs: Losses | None, seed: int) -> Row | None:
    if theirs is None:
        return None
    difference = ours - theirs
    return {"difference": difference.mean, "interval": interval(difference, seed)}


def shown(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """For people, a table a text; `±` is half of a 95 % interval."""
    for text in dict.fromkeys(row["text"] for row in rows):
        of_text = [row for row in rows if row["text"] == text]
        documents = of_text[0]["documents"]
        size = f"{documents} document{'s' * (documents != 1)}, {of_text[0]['tokens']} tokens"
        cells = [
            (
                name_of(row),
                costs_of(row),
                f"{row['loss']:.3f}{half(row['interval'])}",
                f"{row['perplexity']:.2f}",
                signed(row["over_full"]),
                signed(row["over_static"]),
            )
            for row in of_text
        ]
        columns = ("network", "cost", "loss", "perplexity", "over full", "over static")
        title = f"{text}: {size}; nats per token ± half of the 95 % interval"
        yield table(columns, cells, left=["network"], title=title, title_justify="left")


def name_of(row: Mapping[str, Any]) -> str:
    """The network of a row, for people."""
    return str(row["network"]) if row["budget"] is None else f"{row['network']} {row['budget']}"


def costs_of(row: Mapping[str, Any], separator: str = "\n") -> str:
    """The costs of a row's network, one a line, or all in one."""
    return separator.join(f"{ratio:.3f} {cost}" for cost, ratio in row["costs"].items())


def signed(over: Mapping[str, Any] | None) -> str:
    """A difference with half the width of its interval, for people; nothing where there is none."""
    return "" if over is None else f"{over['difference']:+.3f}{half(over['interval'])}"


def half(interval: Sequence[float] | None) -> str:
    """Half the width of an interval; nothing where there is none."""
    return "" if interval is None else f" ±{(interval[1] - interval[0]) / 2:.3f}"


def flat(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The same without nesting, for a table of comma-separated values."""
    for row in rows:
        low, high = row["interval"] or (None, None)
        found = {name: row[name] for name in ("network", "budget", "text", "documents", "tokens")}
        found["cost"] = next(iter(row["costs"].values()), 1.0)
        found |= {"loss": row["loss"], "loss_low": low, "loss_high": high, "perplexity": row["perplexity"]}
        for over in ("over_full", "over_static"):
            each = row[over] or {"difference": None, "interval": None}
            low, high = each["interval"] or (None, None)
            found |= {over: each["difference"], f"{over}_low": low, f"{over}_high": high}
        yield found
