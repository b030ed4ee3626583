"""Passes of an elastic network, seen as a whole: whose turn it is, what is padding, whose KV cache that is.

The module that holds the layers is where every way through the network begins, whoever calls it: the model, its
`generate`, a wrapper that goes by the model's own forward, or a user who wants hidden states.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from flextron_lit.elastic.kv_cache import check_paged, claim, fill
from flextron_lit.elastic.selection import ActiveSelection

PAGED = "cache"
"""What the library calls the cache of continuous batching, where `past_key_values` is any other."""


class ElasticPasses(nn.Module):
    """Stands in for the stock module that holds the layers; one attribute more, as long as it is elastic."""

    elastic: ActiveSelection

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[-1],), *made[2:]


def begin_passes(model: PreTrainedModel, selection: ActiveSelection) -> None:
    """Have all passes of a model ask a selection."""
    holder: Any = model.base_model
    stock: Any = type(holder)
    holder.__class__ = _elastic(stock)
    holder.elastic = selection


def end_passes(model: PreTrainedModel) -> None:
    """Undo that."""
    holder: Any = model.base_model
    holder.__class__ = type(holder).__bases__[-1]
    del holder.elastic


@cache
def _elastic(stock: Any) -> type[ElasticPasses]:
    names = tuple(signature(stock.forward).parameters)[1:]

    @wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        active = self.elastic
        given = dict(zip(names, args, strict=False)) | kwargs
        with _turn(self, active):
            active.begin(given)
            read = given.get("past_key_values")
            if read is not None:
                claim(read, active.current, active.space)
            if given.get(PAGED) is not None:
                check_paged(active)
            result = stock.forward(self, *args, **kwargs)
            written = _cache_of(result) if read is None else read
            if written is not None:
                fill(written, active.current)
            return result

    # it keeps its name, by which the library knows what can be recorded of a class
    same = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (ElasticPasses, stock), {**same, "forward": forward})


def _blank(stock: Any) -> ElasticPasses:
    made = _elastic(stock)
    return made.__new__(made)


def _turn(module: nn.Module, active: ActiveSelection) -> AbstractContextManager[None]:
    """The turn of a pass; one that another thread runs for whoever has the network is a part of that one's.

    Those are recomputations in backward, for which CUDA has threads of its own, and the replicas of `DataParallel`.
    A compiled graph cannot wait: there only the turn of a whole `generate` or `use` counts.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return nullcontext()
    return nullcontext() if getattr(module, "_is_replica", False) else active.turns.turn("pass")


def _cache_of(result: Any) -> Cache | None:
    """The KV cache that a pass made itself."""
    values = result if isinstance(result, tuple) else (getattr(result, "past_key_values", None),)
    return next((value for value in values if isinstance(value, Cache)), None)
