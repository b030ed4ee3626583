"""What makes up for the units that a narrower width leaves out: a projection of its own, or factors for its units.

Parameters of the elastic module that only narrower widths use (ours): the full width stays the dense model to the last
bit. They train with the rest, lie in `elastic/` of a checkpoint, and are folded into the one projection of an export.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor, nn

Form = Literal["none", "scales", "own"]
FORMS: tuple[Form, ...] = get_args(Form)
ATTRIBUTE = "compensation"
"""Of an elastic module; also in the names of its parameters."""
MOST_PROJECTIONS = 4
"""Own projections of a block. A block with more narrow widths than that (attention without groups has a dozen or more)
has them at evenly spaced ones; the others read with the first columns of the next wider one's, by factors of their own.
"""


def anchors(widths: tuple[int, ...], form: Form) -> list[int]:
    """The widths that get a projection of their own, ascending: of the narrower ones all, or some evenly spaced."""
    narrow = [width for width in widths[:-1] if width]
    if form != "own" or len(narrow) <= MOST_PROJECTIONS:
        return narrow if form == "own" else []
    # the widest among them, so that every other has a wider one
    step = (len(narrow) - 1) / (MOST_PROJECTIONS - 1)
    return [narrow[round(i * step)] for i in range(MOST_PROJECTIONS)]


def shapes(widths: tuple[int, ...], rows: int, hidden_size: int, form: Form) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that make up for the units of a block's narrower widths, by the names of `Compensation`."""
    own = anchors(widths, form)
    scaled = [width for width in widths[:-1] if width and width not in own and form != "none"]
    projections: dict[str, tuple[int, ...]] = {f"projections.{width}": (hidden_size, width * rows) for width in own}
    return projections | {f"scales.{width}": (width,) for width in scaled}


class Compensation(nn.Module):
    """Of one elastic block: nothing, or for each narrower width how it reads its units.

    Args:
        tensors: `projections.<width>` [D, width x rows of a unit], `scales.<width>` [width].
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.projections = nn.ParameterDict()
        self.scales = nn.ParameterDict()
        # names may come from a set, in another order in each process; parameters are gone through in theirs by
        # optimizers, by what is saved of them, and by processes that average gradients one after the other
        for name, tensor in sorted((tensors or {}).items(), key=lambda named: int(named[0].rpartition(".")[2])):
            kind, _, width = name.partition(".")
            getattr(self, kind)[width] = nn.Parameter(tensor)
        self._anchors = sorted(int(width) for width in self.projections)

    @property
    def empty(self) -> bool:
        """Whether all widths read with the first columns of the one projection."""
        return not (self.projections or self.scales)

    def owns(self, width: int) -> bool:
        """Whether a width reads with a weight that is not the full network's."""
        return any(anchor >= width for anchor in self._anchors)

    def reading(self, shared: Tensor, units: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The weight [D, columns] that a width reads with, and the units [..., columns] as it reads them.

        Args:
            shared: the full network's projection, [D, all columns].
            units: activations of the width's units, [..., columns].
            width: in units.
        """
        scales = self.scales.get(str(width))
        if scales is not None:
            units = units * scales.repeat_interleave(units.shape[-1] // width)
        return self._base(shared, width)[:, : units.shape[-1]], units

    def folded(self, shared: Tensor, width: int, columns: int, delta: Tensor | None = None) -> Tensor:
        """The one projection of a width, [D, columns]: what a network of that width alone needs.

        Args:
            shared: the full network's projection, [D, all columns].
            width: in units.
            columns: of that width.
            delta: what adapters add to it, [D, all columns].
        """
        weight, ones = self.reading(shared, shared.new_ones(columns), width)
        return (weight if delta is None else weight + delta[:, :columns].to(weight.dtype)) * ones

    def _base(self, shared: Tensor, width: int) -> Tensor:
        anchor = next((anchor for anchor in self._anchors if anchor >= width), None)
        return shared if anchor is None else self.projections[str(anchor)]
