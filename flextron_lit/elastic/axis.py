"""Where the units of an elastic block lie in its tensors, and the two things done to them: order and prefix."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One tensor of a block that carries its units (neurons, or KV groups) along one dimension.

    The dimension holds `parts` equal segments (3 for a fused q|k|v projection, else 1), each of them the units one
    after the other; a unit is as many rows as then fit (for GQA queries: query heads per group times head_dim).
    """

    tensor: str
    """Path within the block's module, for example `q_proj.weight`."""
    dim: int
    """The dimension that carries the units."""
    parts: int = 1
    """Equal segments along that dimension."""

    def split(self, tensor: Tensor, units: int) -> Tensor:
        """View with the dimension opened up to [..., parts, units, rows of a unit, ...]."""
        size = tensor.shape[self.dim]
        assert size % (self.parts * units) == 0, f"{self.tensor}: {size} rows are not {self.parts} x {units} units"
        shape = (*tensor.shape[: self.dim], self.parts, units, -1, *tensor.shape[self.dim + 1 :])
        return tensor.reshape(shape)

    def permuted(self, tensor: Tensor, order: Tensor) -> Tensor:
        """The tensor with its units in another order: a copy of the same shape."""
        opened = self.split(tensor, len(order))
        return opened.index_select(self.dim + 1, order.to(tensor.device)).reshape(tensor.shape)

    def prefix(self, tensor: Tensor, width: int, units: int) -> Tensor:
        """The tensor with only its first `width` of `units` units."""
        narrowed = self.split(tensor, units).narrow(self.dim + 1, 0, width)
        return narrowed.flatten(self.dim, self.dim + 2)

    def prefix_numel(self, tensor: Tensor, width: int, units: int) -> int:
        """Number of elements that `prefix` keeps."""
        return tensor.numel() // units * width
