"""Branches compiled for training: by `torch.compile`, with their backward passes, in this process alone."""

from types import FunctionType
from typing import Any

import torch

from flextron_lit.elastic.compiled.branch import Branch
from flextron_lit.elastic.compiled.packages import Code


def trainable(branch: Branch) -> Code:
    """Code of a branch that gradients go through, made at its first call; once shapes differ, for any."""
    forward: Any = Branch.forward
    # torch keeps what it has compiled at the code object, eight times at most: each branch gets one of its own
    own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
    compiled = torch.compile(own, fullgraph=True)
    return lambda tensors: [compiled(branch, tensors)]
