"""The sequences that one sub-network goes on with together: some join and others leave between two tokens (ours).

Each prompt is read by itself, then its keys and values are put beside the others', padded on the left. What leaves
takes its row along, and the padding that only it needed.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel


class Batch:
    """Sequences with one KV cache; whoever runs it has made the sub-network active.

    Args:
        model: the network.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._cache = DynamicCache()
        self._real = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    def __len__(self) -> int:
        return len(self._real)

    @torch.no_grad()
    def join(self, prompt: Sequence[int]) -> Tensor:
        """Read a prompt, whose sequence is then the last row: the logits behind it, [V]."""
        # no config: a layer with a sliding window keeps all, since rows of other lengths could not be put beside it
        cache = DynamicCache()
        tokens = torch.tensor([list(prompt)], device=self._model.device)
        read = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._beside(cache, torch.ones_like(tokens))
        return cast(Tensor, read.logits[0, -1])

    def _beside(self, cache: DynamicCache, real: Tensor) -> None:
        if not len(self):
            self._cache, self._real = cache, real
            return
        longest = max(self._real.shape[1], real.shape[1])
        for ours, its in zip(_filled(self._cache), _filled(cache), strict=True):
            for name in ("keys", "values"):
                pair = [_padded(getattr(each, name), longest) for each in (ours, its)]
                setattr(ours, name, torch.cat(pair))
        self._real = torch.cat([F.pad(each, (longest - each.shape[1], 0)) for each in (self._real, real)])

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read the next token of every sequence: the logits behind it, [B, V]."""
        positions = self._real.sum(1, keepdim=True)
        self._real = F.pad(self._real, (0, 1), value=1)
        new = torch.tensor(tokens, device=self._model.device)[:, None]
        # without padding the mask says nothing, and attention is faster without one
        mask = None if bool(self._real.all()) else self._real
        read = self._model(
            new, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        return cast(Tensor, read.logits[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but those in these rows."""
        if not rows:
            self._cache, self._real = DynamicCache(), self._real[:0, :0]
            return
        index = torch.tensor(rows, device=self._real.device)
        real = self._real[index]
        padding = int(real.argmax(1).min())
        self._real = real[:, padding:]
        for layer in _filled(self._cache):
            layer.keys, layer.values = layer.keys[index, :, padding:], layer.values[index, :, padding:]


def _filled(cache: DynamicCache) -> list[Any]:
    """The layers that hold anything: those whose attention is not skipped."""
    return [layer for layer in cast(list[Any], cache.layers) if layer.is_initialized]


def _padded(states: Tensor, tokens: int) -> Tensor:
    """Keys or values [B, K, T, head_dim] with so many tokens, on the left some that nobody sees."""
    return F.pad(states, (0, 0, tokens - states.shape[2], 0))
