"""What surrogates and routers learned, as figures."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from flextron_lit.costs.table import CostTable
from flextron_lit.routers.ladder import Ladder
from flextron_lit.space import KINDS, ElasticSpace


def predicted_against_observed(
    predicted: Sequence[float], observed: Sequence[float], title: str, what: str = "loss (nats per token)"
) -> Figure:
    """Losses of held-out sub-networks, or something else about them: perfect predictions lie on the diagonal."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(predicted, observed, "o", alpha=0.6)
    axes.axline((min(observed), min(observed)), slope=1, linestyle="--", color="grey")
    axes.set(xlabel=f"predicted {what}", ylabel=f"observed {what}", title=title)
    axes.grid(alpha=0.3)
    return figure


def widths_against_budget(ladder: Ladder, space: ElasticSpace, table: CostTable) -> Figure:
    """Heat maps of the width that every layer gets for each budget, a panel a kind of block."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    widths = [space.widths(rung.sub_network) for rung in ladder.rungs]
    ratios = [rung.cost / table.full for rung in ladder.rungs]
    for kind, axes in zip(KINDS, figure.subplots(1, len(KINDS)), strict=True):
        of_kind = [(index, block) for index, block in enumerate(space.blocks) if block.kind == kind]
        rows = [[chosen[index] / block.full for chosen in widths] for index, block in of_kind]
        # rungs are not evenly spaced in cost: each column ends where the next one begins
        edges = [*ratios, ratios[-1] + 0.01]
        drawn = axes.pcolormesh(edges, range(len(rows) + 1), rows, vmin=0, vmax=1, cmap="viridis")
        axes.set(xlabel=f"budget (share of the full network's {table.name})", ylabel="layer", title=f"width of {kind}")
        axes.invert_yaxis()
    figure.colorbar(drawn, ax=figure.axes, label="share of the full width")
    return figure


def cost_against_budget(ladder: Ladder, table: CostTable) -> Figure:
    """What each budget's answer costs, and its loss."""
    kind = "measured" if ladder.measured else "predicted"
    figure = Figure(figsize=(9, 4), layout="constrained")
    costs, losses = figure.subplots(1, 2)
    ratios = [rung.cost / table.full for rung in ladder.rungs]
    costs.step([*ratios, 1.0], [*ratios, ratios[-1]], where="post")
    costs.axline((1, 1), slope=1, linestyle="--", color="grey")
    costs.set(
        xlabel="budget", ylabel=f"{table.name} of the answer", title="cost against budget (shares of the full network)"
    )
    losses.step(ratios, [rung.loss for rung in ladder.rungs], where="post")
    losses.set(xlabel="budget", ylabel=f"{kind} loss (nats per token)", title=f"{kind} loss against budget")
    for axes in (costs, losses):
        axes.grid(alpha=0.3)
    return figure
