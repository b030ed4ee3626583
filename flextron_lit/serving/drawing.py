"""The next token of one sequence from its logits: by its own settings and its own generator, whoever is beside it."""

import torch
from torch import Tensor

from flextron_lit.serving.asked import Sampling


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token, or take the likeliest.

    Args:
        logits: [V].
        sampling: temperature 0 takes the likeliest; `top_p` keeps the fewest tokens whose probabilities add up to it.
        generator: on the CPU, where it draws the same whatever computed the logits.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double().cpu() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        falling, order = probabilities.sort(descending=True)
        # the likeliest always stays
        falling[1:][falling.cumsum(0)[:-1] >= sampling.top_p] = 0
        return int(order[torch.multinomial(falling, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
